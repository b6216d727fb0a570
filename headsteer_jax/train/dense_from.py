"""Takes over another run's dense phase and dense control (train.dense_from), so that they are trained only once."""

import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path

from headsteer_jax.config.files import flatten, read_saved_config
from headsteer_jax.config.paths import expand_path
from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import Dataset, describe_data, describe_data_change
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.vit import build_model
from headsteer_jax.model.weights import fingerprint_weights
from headsteer_jax.runtime import hosts, mesh
from headsteer_jax.runtime.buckets import check_reachable
from headsteer_jax.runtime.checkpoint import Checkpoints
from headsteer_jax.runtime.files import read_json
from headsteer_jax.train.log import open_log, read_log
from headsteer_jax.train.loop import Phase, abstract_params, describe_state, init_params, init_state, phase_plan
from headsteer_jax.train.step import is_gate

logger = logging.getLogger(__name__)

# fields of the sections model, train and data on which a dense phase depends or does not; the images are compared
NOT_DENSE = (
    "model.pretrained", "train.gated", "train.dense_control", "train.dense_from", "train.use", "train.eval_batch",
    "train.steps_per_call", "train.eval_every",
)  # fmt: skip
AUGMENTATION = (
    "image_size", "channels", "mean", "std", "crop_padding", "crop_fill", "crop_scale", "flip", "rand_augment_ops",
    "rand_augment_magnitude",
)  # fmt: skip


def _list_dense_fields(config: Config) -> dict[str, Any]:
    """List the fields on which a dense phase depends."""
    read = ("seed", "model.", "train.", *(f"data.{name}" for name in AUGMENTATION))
    fields = {name: value for name, value in flatten(config).items() if name.startswith(read)}
    return {name: value for name, value in fields.items() if not name.startswith(NOT_DENSE)}


def _locate(config: Config) -> Path:
    return Path(expand_path(config.train.dense_from, "config.train.dense_from"))


def check_dense_from(config: Config) -> Config:
    """Read the config of the run that train.dense_from names, and check that its dense phase is this config's.

    Raises:
      HeadSteerError: there is no such run; a field differs on which the dense phase depends; or its backbone does.
    """
    directory, name = _locate(config), f"config.train.dense_from = {config.train.dense_from!r}"
    check_reachable(directory)
    if not (directory / "config.json").exists():
        raise HeadSteerError(f"{name}: no run was started there; give the workdir of a run whose training is finished")
    other = read_saved_config(directory / "config.json")
    theirs, ours = _list_dense_fields(other), _list_dense_fields(config)
    remedy = "use the same value, or leave dense_from empty"
    if differing := [field for field, value in ours.items() if theirs.get(field) != value]:
        field = differing[0]
        raise HeadSteerError(
            f"{name}: its dense phase was trained with {field} = {theirs.get(field)!r}, but this config has "
            f"{ours[field]!r}; {remedy}"
        )
    record = directory / "train" / "started.json"
    begun_with = read_json(record)["file"]["hash"] if record.exists() and other.model.pretrained else ""
    other_file = begun_with and (this_file := fingerprint_weights(config.model.pretrained)) and this_file != begun_with
    if bool(other.model.pretrained) != bool(config.model.pretrained) or other_file:
        raise HeadSteerError(
            f"{name}: its dense phase began with model.pretrained = {other.model.pretrained!r}, but this config has "
            f"{config.model.pretrained!r}; {remedy}"
        )
    return other


class _Adopted(NamedTuple):
    """A finished phase of another run."""

    params: Any
    average: Any  # None without one
    metadata: dict[str, Any]


def take_over_dense(config: Config, dataset: Dataset, directory: Path) -> None:
    """Copy the dense phase of another run, and its dense control if this config's is the same and it is finished.

    The copies become this training's own finished phases, with their rows of the log. A phase that has begun here is
    left alone. The parameters of the gates, which the dense phase does not use, are this config's initial ones.

    Raises:
      HeadSteerError: as `check_dense_from`; or the other run's checkpoint is missing, damaged, unfinished, or of other
        data.
    """
    begun = [phase for phase in ("dense", "dense_control") if _open(directory, phase, config).latest() is not None]
    if "dense" in begun:
        return
    other, source = check_dense_from(config), _locate(config) / "train"
    adopted: dict[Phase, _Adopted] = {"dense": _read_phase("dense", config, other, dataset, source)}
    same_control = other.train.dense_control and other.train.gated == config.train.gated
    if config.train.dense_control and same_control and "dense_control" not in begun and _ends(source, other):
        adopted["dense_control"] = _read_phase("dense_control", config, other, dataset, source)
    params = init_params(build_model(config, len(dataset.class_names)), config, config.seed, dataset.class_names)
    for phase in reversed(adopted):  # the dense phase last: with it, all is taken over
        _write_phase(phase, config, params, adopted[phase], source, directory)
    logger.info(f"{' and '.join(adopted)}: taken over from {source}")


def _open(directory: Path, phase: str, config: Config) -> Checkpoints:
    return Checkpoints(directory / phase / "last", config.machine.keep)


def _ends(source: Path, other: Config) -> bool:
    """Say whether the other run's control is finished."""
    place = source / "dense_control" / "last"
    return place.exists() and Checkpoints(place, writes=False).latest() == other.train.gated.steps


def _read_phase(phase: Phase, config: Config, other: Config, dataset: Dataset, source: Path) -> _Adopted:
    """Read the last checkpoint of a finished phase; see `take_over_dense`."""
    steps, saved = phase_plan(config, phase).steps, Checkpoints(source / phase / "last", writes=False)
    params = abstract_params(other, len(dataset.class_names))
    abstract = jax.eval_shape(lambda params: init_state(params, phase, other), params)
    if saved.latest() != steps:
        raise HeadSteerError(f"{saved.directory}: it ends at step {saved.latest()} of {steps}; finish that run first")
    complete = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract)
    state, metadata = saved.restore(complete, steps)
    if change := describe_data_change(metadata["data"], describe_data(dataset)):
        raise HeadSteerError(f"{saved.directory}: was trained on other data: {change}; leave train.dense_from empty")
    return _Adopted(state.params, state.average, metadata)


def _write_phase(phase: Phase, config: Config, initial: Any, adopted: _Adopted, source: Path, directory: Path) -> None:
    """Write a finished phase, first its rows of the log: with the checkpoint it counts as taken over."""
    steps = phase_plan(config, phase).steps

    def adopt(params: Any) -> Any:
        """Take the other run's parameters, except those of the gates."""
        theirs = dict(jax.tree_util.tree_leaves_with_path(params))
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if is_gate(path) else np.asarray(theirs[path]), initial
        )

    with open_log(directory, config) as log:
        log.forget_after(phase, -1)
        for row in read_log(source / "metrics.jsonl"):
            if row["phase"] == phase:
                log.write(phase, row["step"], {name: row[name] for name in row if name not in ("phase", "step")})
        log.flush()
    state = init_state(adopt(adopted.params), phase, config)._replace(step=jnp.int32(steps))
    if adopted.average is not None:
        state = state._replace(average=adopt(adopted.average))
    described = describe_state(initial, phase, config, mesh.training_mesh(config.machine))
    state = mesh.place(hosts.to_numpy(state), jax.tree.map(lambda leaf: leaf.sharding, described))
    checkpoints = _open(directory, phase, config)
    checkpoints.save(steps, state, adopted.metadata)
    checkpoints.close()
