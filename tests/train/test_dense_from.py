"""Taking over another run's dense phase: the same as training it, and refused where it is not this config's."""

import functools
import shutil

import chex
import jax
import numpy as np
import pytest
from builders import blobs, tiny_config
from etils.epath import Path

from headsteer_jax.config import PhaseConfig
from headsteer_jax.data.dataset import Dataset
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.train import loop
from headsteer_jax.train.dense_from import check_dense_from, take_over_dense
from headsteer_jax.train.log import read_log


@pytest.fixture(scope="module")
def dataset():
    return Dataset(blobs(96, 0), blobs(30, 1), blobs(30, 2), ("a", "b", "c"))


@pytest.fixture(scope="module")
def first_run(dataset, tmp_path_factory):
    """A run's workdir whose training is finished. Tests must not change it."""
    workdir, config = tmp_path_factory.mktemp("first"), tiny_config()
    loop.train_model(config, dataset, workdir / "train")
    (workdir / "config.json").write_text(config.model_dump_json())
    return workdir


def with_train(config, **fields):
    return config.model_copy(update={"train": config.train.model_copy(update=fields)})


def load(config, directory, phase):
    return loop.load_trained(config, 3, directory, phase).params


def is_gate(path):
    return any(str(key.key).startswith("decide") for key in path)


def split_gates(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves if not is_gate(path)}


def test_other_kinds_of_gates_start_from_the_same_dense_model(dataset, first_run, tmp_path):
    config = with_train(tiny_config(kinds=("heads", "sublayers", "tokens")), dense_from=str(first_run))
    take_over_dense(config, dataset, tmp_path)
    for phase in ("dense", "dense_control"):
        theirs, ours = load(tiny_config(), first_run / "train", phase), load(config, tmp_path, phase)
        chex.assert_trees_all_equal(split_gates(ours), split_gates(theirs))
    theirs, ours = (
        [row for row in read_log(Path(place / "metrics.jsonl")) if row["phase"] != "gated"]
        for place in (first_run / "train", tmp_path)
    )
    in_order = functools.partial(sorted, key=lambda row: (row["phase"], row["step"]))
    assert in_order(theirs) == in_order(ours)


def test_only_the_gated_phase_is_trained(dataset, first_run, tmp_path):
    config = with_train(tiny_config(kinds=("heads", "sublayers"), budget=0.9), dense_from=str(first_run))
    take_over_dense(config, dataset, tmp_path)
    before = split_gates(load(config, tmp_path, "dense"))
    loop.train_model(config, dataset, tmp_path)
    chex.assert_trees_all_equal(split_gates(load(config, tmp_path, "dense")), before)
    assert {row["phase"] for row in read_log(Path(tmp_path / "speed.jsonl"))} == {"gated"}


def test_without_weight_decay_it_is_the_training_itself_bit_for_bit(dataset, tmp_path):
    """The dense phase changes the gates' parameters by weight decay alone."""
    config = with_train(tiny_config(), weight_decay=0.0)
    loop.train_model(config, dataset, tmp_path / "first" / "train")
    (tmp_path / "first" / "config.json").write_text(config.model_dump_json())
    copying = with_train(config, dense_from=str(tmp_path / "first"))
    take_over_dense(copying, dataset, tmp_path / "second")
    loop.train_model(copying, dataset, tmp_path / "second")
    for phase in loop.PHASES:
        theirs, ours = load(config, tmp_path / "first" / "train", phase), load(copying, tmp_path / "second", phase)
        chex.assert_trees_all_equal(ours, theirs)


def test_a_control_of_another_length_is_trained(dataset, first_run, tmp_path):
    config = with_train(tiny_config(), dense_from=str(first_run), gated=PhaseConfig(steps=4))
    take_over_dense(config, dataset, tmp_path)
    assert (tmp_path / "dense" / "last" / "8").exists()
    assert not list((tmp_path / "dense_control" / "last").glob("*"))


def test_a_phase_that_has_begun_is_left_alone(dataset, first_run, tmp_path):
    config = with_train(tiny_config(), dense_from=str(first_run))
    take_over_dense(config, dataset, tmp_path)
    before = load(config, tmp_path, "dense")
    take_over_dense(with_train(config, dense_from="nowhere"), dataset, tmp_path)
    chex.assert_trees_all_equal(load(config, tmp_path, "dense"), before)


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"batch": 8}, "train.batch = 16"), ({"dense": PhaseConfig(steps=4)}, "train.dense.steps = 8")],
)
def test_another_dense_phase_is_refused(first_run, fields, named):
    with pytest.raises(HeadSteerError, match=named):
        check_dense_from(with_train(tiny_config(), dense_from=str(first_run), **fields))


def test_other_augmentation_or_another_backbone_is_refused(first_run):
    config = with_train(tiny_config(), dense_from=str(first_run))
    flipped = config.model_copy(update={"data": config.data.model_copy(update={"flip": True})})
    with pytest.raises(HeadSteerError, match=r"data.flip = False, but this config has True"):
        check_dense_from(flipped)
    pretrained = config.model_copy(update={"model": config.model.model_copy(update={"pretrained": "vit.safetensors"})})
    with pytest.raises(HeadSteerError, match=r"model.pretrained = '', but this config has 'vit.safetensors'"):
        check_dense_from(pretrained)


def test_an_unfinished_control_is_trained(dataset, first_run, tmp_path):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(first_run, unfinished)
    shutil.rmtree(unfinished / "train" / "dense_control" / "last" / "8")
    config = with_train(tiny_config(), dense_from=str(unfinished))
    take_over_dense(config, dataset, tmp_path / "new")
    assert (tmp_path / "new" / "dense" / "last" / "8").exists()
    assert not list((tmp_path / "new" / "dense_control" / "last").glob("*"))


def test_bad_runs_are_refused(dataset, first_run, tmp_path):
    with pytest.raises(HeadSteerError, match=r"config.train.dense_from = .* no run was started there"):
        check_dense_from(with_train(tiny_config(), dense_from=str(tmp_path / "nowhere")))
    other = Dataset(blobs(96, 5), dataset.validation, dataset.test, dataset.class_names)
    config = with_train(tiny_config(), dense_from=str(first_run))
    with pytest.raises(HeadSteerError, match="trained on other data: other images in train"):
        take_over_dense(config, other, tmp_path / "new")
    assert not (tmp_path / "new" / "dense" / "last" / "8").exists()
    unfinished = tmp_path / "unfinished"
    shutil.copytree(first_run, unfinished)
    shutil.rmtree(unfinished / "train" / "dense" / "last" / "8")
    with pytest.raises(HeadSteerError, match="step 4 of 8; finish that run first"):
        take_over_dense(with_train(config, dense_from=str(unfinished)), dataset, tmp_path / "newer")
