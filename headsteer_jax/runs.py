"""A finished run in Python: load it, inspect it, and sweep any strategy over it.

Example:
  run = load_run("runs/double_digits")
  sweep = run.sweep({"class": "class", "mine": my_strategy}, alphas=np.linspace(-4, 16, 401))
  sweep.accuracy.sel(named_by="true").plot.line(x="alpha")
  predictions = run.predict(run.dataset.test.images[:8], steer="class:42", alpha=2)
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray
from etils.epath import Path
from pydantic import ValidationError

from headsteer_jax.analysis.summary import summarise
from headsteer_jax.analysis.sweep_file import to_dataset
from headsteer_jax.books import explain_staleness, is_done, read_inputs, read_record
from headsteer_jax.config.files import first_fault, read_saved_config
from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import Dataset, describe_data, describe_data_change
from headsteer_jax.data.sources import load_dataset
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime.buckets import open_workdir
from headsteer_jax.runtime.files import REMAKE, Workdir, read_arrays
from headsteer_jax.runtime.hub import download_run, is_on_hub, parse_address
from headsteer_jax.runtime.settings import open_devices, use_own_settings
from headsteer_jax.runtime.staging import locate_complete
from headsteer_jax.sae.autoencoder import Autoencoder
from headsteer_jax.sae.latents import rank_latent_classes
from headsteer_jax.sae.store import RunData
from headsteer_jax.stages import STAGES, load_run_data
from headsteer_jax.steer.answers import (
    Predictions,
    check_images,
    find_steering_rule,
    make_predict,
    parse_steering,
)
from headsteer_jax.steer.by_image import ImageStrategy
from headsteer_jax.steer.catalogue import ClassStrategy, find_strategy, per_class_strategy
from headsteer_jax.steer.results import SweepResult
from headsteer_jax.steer.strategies import Strategy
from headsteer_jax.steer.sweep import check_strategies_and_classes, check_validation, run_sweep
from headsteer_jax.steer.tally import StepFunction

LATENT_CLASSES = 5  # that name a latent, as on the page of the latents


@dataclass(frozen=True)
class Run(RunData):
    """A finished run in memory: its model, data and autoencoders, sweeps over them, and answers for images."""

    latent_classes: np.ndarray  # [F, LATENT_CLASSES] int32, the classes on which a latent fires most often, -1: no more

    @property
    def config(self) -> Config:
        """The config of the last command that ran in the directory."""
        return self.trained.config

    def autoencoder(self, seed: int = 0) -> Autoencoder:
        """Pick the autoencoder of one seed: `run.autoencoder(0).encode(x)`.

        Raises:
          HeadSteerError: there is no such seed.
        """
        if not 0 <= seed < self.autoencoders.members:
            raise HeadSteerError(f"there is no autoencoder {seed}; choose from 0 to {self.autoencoders.members - 1}")
        return self.autoencoders.member(seed)

    @use_own_settings()
    def sweep(self, strategies: "Strategies", **steer: Any) -> xarray.Dataset:
        """Steer validation and test with some strategies.

        Args:
          strategies: names of built-in strategies, or `module:function`; or a mapping from names of your choice to
            these, or to functions `(latent statistics, class) -> latents, weights` or `-> direction`. A random
            strategy under two names is drawn twice.
          steer: fields of config.steer to change, for instance `alphas`.

        Returns:
          The dataset of sweep.nc (docs/reference/outputs.md), with `accuracy` and `usage` on test.

        Raises:
          HeadSteerError: a field, strategy or class is not valid.
        """
        config, result = self._run_sweep(strategies, steer)
        _, scored = summarise(result, config)
        return to_dataset(result, scored)

    @use_own_settings()
    def exact(self, choose: "str | ClassStrategy", split: str = "test", **steer: Any) -> StepFunction:
        """Compute accuracy and usage as exact functions of alpha on a split, over all seeds, steered by the label.

        Args:
          choose: the strategy, as one of those of `sweep`.
          split: validation or test.
          steer: fields of config.steer to change.

        Raises:
          HeadSteerError: as `sweep`; or alpha is not exact for this config.
        """
        _, result = self._run_sweep({"strategy": choose}, steer | {"alphas": (1.0,)})
        steps = result.steps
        if not steps:
            raise HeadSteerError(
                "exact alphas need steer.mode = 'add', form = 'delta', target = 'policy', a gate without LayerNorm, "
                "and a layer whose gate patterns fit a table"
            )
        if split not in steps:
            raise HeadSteerError(f"there is no split {split!r} to steer; choose from {', '.join(steps)}")
        return steps[split]["strategy"]

    @use_own_settings()
    def predict(
        self, images: np.ndarray, steer: str | None = None, alpha: float | None = None, latents: int = 5
    ) -> Predictions:
        """Predict the classes of images, with the gates and latents behind them, and steer them if that is asked.

        Args:
          images: [N, height, width, channels] uint8, as run.dataset has them.
          steer: `STRATEGY:CLASS`, or `STRATEGY` alone, which steers each image by the class that the model predicts.
          alpha: the steering strength.
          latents: K, how many of each image's strongest latents are returned; `latent_classes` names them.

        Returns:
          label [N] int32, confidence [N] float32, gates by kind [N, A, n] bool of the A layers that have it, latents
          [N, K] int32, activations [N, K] float32, and steered: the first three under steering, or None.

        Raises:
          HeadSteerError: the images have another shape or type, or there is no such strategy, class or latent.
        """
        check_images(images, tuple(self.dataset.train.images.shape[1:]))
        check_alpha(steer, alpha, ("steer", "alpha"))
        if not 0 <= latents <= len(self.latent_classes):
            raise HeadSteerError(f"latents = {latents}: must be from 0 to {len(self.latent_classes)}")
        rule = None
        if steer is not None:
            rule = find_steering_rule(self, *parse_steering(steer, self.dataset.class_names, "steer"))
        return make_predict(self.trained, self.autoencoders.member(0), latents, rule, alpha or 0.0)(images)

    def _run_sweep(self, strategies: "Strategies", steer: Mapping[str, Any]) -> tuple[Config, SweepResult]:
        """Run a sweep with changed fields of config.steer; return the config as well."""
        if isinstance(strategies, str):
            strategies = [strategies]
        by_name = strategies if isinstance(strategies, Mapping) else {name: name for name in strategies}
        functions = {name: _resolve_strategy(choose, name) for name, choose in by_name.items()}
        if not functions:
            raise HeadSteerError("there is no strategy to sweep; give at least one")
        config = self.config.model_dump()
        config["steer"] |= {name: _to_tuples(value) for name, value in steer.items()} | {"strategies": ("class",)}
        try:
            checked = Config.model_validate(config)
        except ValidationError as error:
            raise HeadSteerError(first_fault(error)) from None
        check_strategies_and_classes(checked, self.dataset)
        check_validation(self.dataset.validation, checked, self.dataset.class_names)
        trained = self.trained._replace(config=checked)
        return checked, run_sweep(replace(self, trained=trained), functions)


Strategies = str | Sequence[str] | Mapping[str, str | ClassStrategy]


def check_alpha(steer: str | None, alpha: float | None, flags: tuple[str, str]) -> None:
    """Check that a strategy and its strength are given together, and that the strength is a finite number.

    Args:
      flags: how a user gives each.

    Raises:
      HeadSteerError: they are not.
    """
    if (steer is None) != (alpha is None):
        first, missing = flags if alpha is None else flags[::-1]
        raise HeadSteerError(f"{first}: needs {missing} as well; give both, the strategy and its strength, or neither")
    if alpha is not None and not np.isfinite(alpha):
        raise HeadSteerError(f"{flags[1]}={alpha}: must be a finite number")


def _resolve_strategy(choose: "str | Callable[..., Any]", name: str) -> "Strategy | ImageStrategy":
    """Find a strategy by its name, or adapt a user's function."""
    return find_strategy(choose) if isinstance(choose, str) else per_class_strategy(choose, name)


def _to_tuples(value: Any) -> Any:
    """Convert arrays and lists to tuples, as the config has them."""
    return tuple(np.asarray(value).tolist()) if isinstance(value, (list, np.ndarray)) else value


@use_own_settings()
def load_run(directory: str | os.PathLike[str], data: "str | os.PathLike[str] | Dataset | None" = None) -> Run:
    """Load a run whose stages train and sae are done, with the config of the last command that ran there.

    Args:
      directory: the run's directory, gs://bucket/path, or hf://owner/name for a run that `headsteer push` wrote to the
        Hugging Face hub (hf://owner/name@revision: of a branch, tag or commit), which is downloaded once.
      data: the new path of the data, if they have moved since; or the dataset itself.

    Raises:
      HeadSteerError: a stage is missing, stale or damaged, or the data are missing or have changed; or as `locate_run`.
    """
    open_devices()
    workdir = locate_run(os.fspath(directory), "load_run")
    config = read_config(workdir)
    for name in ("train", "sae"):
        check_done(config, workdir, name, "load_run")
    config, dataset = load_run_dataset(config, workdir, data, "load_run(..., data=PATH)")
    loaded = load_run_data(config, dataset, workdir)
    return Run(loaded.trained, loaded.dataset, loaded.autoencoders, loaded.x_train, read_latent_classes(workdir))


def read_latent_classes(workdir: Workdir) -> np.ndarray:
    """Read the classes that name each latent of the first autoencoder: [F, LATENT_CLASSES] int32, -1 if it has fewer.

    Raises:
      HeadSteerError: the file is missing or damaged.
    """
    arrays = read_arrays(workdir / "sae/inside.npz")
    return rank_latent_classes(arrays["class_counts"], arrays["class_means"], LATENT_CLASSES)


def locate_run(location: str, name: str) -> Workdir:
    """Locate a run that is to be read: in a directory, in a bucket, or on the hub, from where it is downloaded once.

    Args:
      location: the directory, gs://bucket/path, hf://owner/name or hf://owner/name@revision.
      name: what it was given as, such as RUN, for the error.

    Raises:
      HeadSteerError: the location is of a kind that is not supported; the bucket or the hub cannot be reached; or the
        repository does not exist, may not be read or holds no run.
    """
    if not is_on_hub(location):
        return open_workdir(location, name)
    address = parse_address(location, name)
    return Workdir(Path(download_run(address)), title=address.name)


def load_run_dataset(
    config: Config, workdir: Workdir, data: "str | os.PathLike[str] | Dataset | None", remedy: str
) -> tuple[Config, Dataset]:
    """Load the dataset of a finished run, and check that it is the one that the run was made with.

    Args:
      data: the new path of the data, if they have moved since; or the dataset itself.
      remedy: how a user passes a new path.

    Returns:
      The config, with the path of the data, and the dataset.

    Raises:
      HeadSteerError: the data are missing or have changed.
    """
    if isinstance(data, str | os.PathLike):
        config = config.model_copy(update={"data": config.data.model_copy(update={"path": os.fspath(data)})})
    if isinstance(data, Dataset):
        dataset = data
    else:
        try:
            dataset = load_dataset(config.data, config.data_seed, config.machine.image_memory)
        except HeadSteerError as error:
            raise HeadSteerError(f"{error}; if the data have moved, use {remedy}") from None
    record = read_record(workdir, "train")
    if record and record["data"] and (change := describe_data_change(record["data"], describe_data(dataset))):
        raise HeadSteerError(
            f"{workdir.path}: the data have changed since this run: {change}; use the data that it was made with"
        )
    return config, dataset


def count_classes(workdir: Workdir) -> int:
    """Count the classes of a run's data, from the record of its stage train.

    Raises:
      HeadSteerError: the record is missing or damaged.
    """
    return len(read_data_record(workdir)["classes"])


def read_data_record(workdir: Workdir) -> dict[str, Any]:
    """Read the description of a run's data (`describe_data`) from the record of its stage train.

    Raises:
      HeadSteerError: the record is missing or damaged.
    """
    record = read_record(workdir, "train")
    if record is None or not record["data"]:
        raise HeadSteerError(f"{workdir / 'train'}: its record does not say which data it was made with; {REMAKE}")
    data: dict[str, Any] = record["data"]
    return data


def read_config(workdir: Workdir) -> Config:
    """Read the config of the last command that ran in a directory.

    Raises:
      HeadSteerError: no run was started there, or its config.json is damaged or of another version.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise HeadSteerError(
            f"{path}: no such file, so no run was started here; start one with headsteer run --workdir={workdir.path}"
        )
    return read_saved_config(path)


def check_done(config: Config, workdir: Workdir, name: str, reader: str) -> None:
    """Check that a stage is finished, and of this config.

    Args:
      reader: what needs it, for the error.

    Raises:
      HeadSteerError: it is not.
    """
    if not is_done(workdir, STAGES[name]):
        raise HeadSteerError(
            f"{reader} needs the stage {name}, which is not done in {workdir.path}; compute it with headsteer run "
            f"--workdir={workdir.path} --stages={name}"
        )
    if locate_complete(workdir, name) != workdir / name:
        raise HeadSteerError(
            f"{workdir / name}: its old results are not replaced by the new ones yet, because a run was interrupted; "
            "run the same command again"
        )
    if reason := explain_staleness(read_inputs(config, None), workdir, STAGES[name]):
        raise HeadSteerError(
            f"{workdir / name}: does not belong to this run's config.json ({reason}); compute it again with "
            "headsteer run --overwrite"
        )
