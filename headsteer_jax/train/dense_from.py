"""Takes over another run's dense phase and dense control (train.dense_from), so that they are trained only once."""

import logging
from typing import Any

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
from headsteer_jax.runtime.checkpoint import Checkpoints
from headsteer_jax.train.log import open_log, read_log
from headsteer_jax.train.loop import Phase, abstract_params, init_params, init_state, phase_plan
from headsteer_jax.train.step import is_gate

logger = logging.getLogger(__name__)

# fields on which a dense phase does not depend; model.pretrained names a place
NOT_DENSE = (
    "model.pretrained", "train.gated", "train.dense_control", "train.dense_from", "train.use", "train.eval_batch",
    "train.steps_per_call", "train.eval_every",
)  # fmt: skip


def _list_dense_fields(config: Config) -> dict[str, Any]:
    """List the fields on which a dense phase depends, except those of the data, whose content is compared."""
    fields = {name: value for name, value in flatten(config).items() if name.startswith(("seed", "model.", "train."))}
    return {name: value for name, value in fields.items() if not name.startswith(NOT_DENSE)}


def check_dense_from(config: Config) -> Config:
    """Read the config of the run that train.dense_from names, and check that its dense phase is this config's.

    Raises:
      HeadSteerError: there is no such run, or a field differs on which the dense phase depends.
    """
    directory = _locate(config)
    other = read_saved_config(directory / "config.json")
    theirs, ours = _list_dense_fields(other), _list_dense_fields(config)
    if differing := [name for name, value in ours.items() if theirs.get(name) != value]:
        name = differing[0]
        raise HeadSteerError(
            f"config.train.dense_from = {config.train.dense_from!r}: its dense phase was trained with {name} = "
            f"{theirs.get(name)!r}, but this config has {ours[name]!r}; use the same value, or leave dense_from empty"
        )
    return other


def _locate(config: Config) -> Path:
    return Path(expand_path(config.train.dense_from, "config.train.dense_from"))


def take_over_dense(config: Config, dataset: Dataset, directory: Path) -> None:
    """Copy the dense phase of another run, and its dense control if this config's is the same.

    The copies become this training's own finished phases, with their rows of the log. A phase that has begun here is
    left alone. The parameters of the gates, which the dense phase does not use, are this config's initial ones.

    Raises:
      HeadSteerError: as `check_dense_from`; or the other run's checkpoint is missing, damaged, unfinished, or of other
        data.
    """
    if Checkpoints(directory / "dense" / "last", config.machine.keep).latest() is not None:
        return
    other, source = check_dense_from(config), _locate(config) / "train"
    model = build_model(config, len(dataset.class_names))
    initial = init_params(model, config, config.seed, dataset.class_names, backbone=False)
    phases: list[Phase] = ["dense"]
    same_control = other.train.dense_control and other.train.gated == config.train.gated
    if config.train.dense_control and same_control:
        phases.append("dense_control")
    for phase in phases:
        _copy_phase(phase, config, other, dataset, initial, source, directory)
    logger.info(f"{' and '.join(phases)}: taken over from {source}")


def _copy_phase(
    phase: Phase, config: Config, other: Config, dataset: Dataset, initial: Any, source: Path, directory: Path
) -> None:
    """Copy the last checkpoint of a finished phase and its rows of the log; see `take_over_dense`."""
    steps = phase_plan(config, phase).steps
    saved = Checkpoints(source / phase / "last", writes=False)
    params = abstract_params(other, len(dataset.class_names))
    abstract = jax.eval_shape(lambda params: init_state(params, phase, other), params)
    like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract)
    if saved.latest() != steps:
        raise HeadSteerError(f"{saved.directory}: it ends at step {saved.latest()} of {steps}; finish that run first")
    state, metadata = saved.restore(like, steps)
    if change := describe_data_change(metadata["data"], describe_data(dataset)):
        raise HeadSteerError(f"{saved.directory}: was trained on other data: {change}; leave train.dense_from empty")

    def adopt(params: Any) -> Any:
        """Take the other run's parameters, except those of the gates."""
        theirs = dict(jax.tree_util.tree_leaves_with_path(params))
        return jax.tree_util.tree_map_with_path(
            lambda path, own: own if is_gate(path) else np.asarray(theirs[path]), initial
        )

    adopted = init_state(adopt(state.params), phase, config)._replace(step=jnp.int32(steps))
    if state.average is not None:
        adopted = adopted._replace(average=adopt(state.average))
    own = Checkpoints(directory / phase / "last", config.machine.keep)
    own.save(steps, adopted, metadata)
    own.close()
    with open_log(directory) as log:
        log.forget_after(phase, -1)
        for row in read_log(source / "metrics.jsonl"):
            if row["phase"] == phase:
                log.write(phase, row["step"], {name: row[name] for name in row if name not in ("phase", "step")})
