"""From a run's directory to a deployed model: everything that can be wrong is found before anything is computed."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from headsteer_jax.analysis.sweep_file import read_sweep
from headsteer_jax.books import read_record
from headsteer_jax.config.paths import expand_path
from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import SPLITS, Dataset, check_classes
from headsteer_jax.deploy.build import Sources, build_dynamic, build_specialised, write_deployed
from headsteer_jax.deploy.convert import describe_model
from headsteer_jax.deploy.formats import write_formats
from headsteer_jax.deploy.model import DeployedConfig, DeployedModel
from headsteer_jax.deploy.request import Request
from headsteer_jax.deploy.specialise import check_budget
from headsteer_jax.deploy.steered import ClassSteering, check_foldable, find_choice
from headsteer_jax.deploy.store import REDEPLOY, check_output, load_deployed, read_description, replace_directory
from headsteer_jax.errors import HeadSteerError, explain_errors
from headsteer_jax.report.speed import draw_speed
from headsteer_jax.runs import check_done, count_classes, load_run_dataset, read_config
from headsteer_jax.runtime.files import Workdir
from headsteer_jax.sae.autoencoder import encode_split
from headsteer_jax.sae.store import read_autoencoders
from headsteer_jax.steer.strategies import latent_statistics
from headsteer_jax.train.loop import Phase, load_trained, reference_phase

logger = logging.getLogger(__name__)


def check_request(workdir: Workdir, request: Request, output: Path) -> np.ndarray:
    """Check what was asked against the run, before its data are loaded.

    Returns:
      The classes by which the model is made, as indices, ascending.

    Raises:
      HeadSteerError: a stage is missing, a class does not exist or is named twice, the budget cannot be met, steering
        does not fold, or the output directory is not ours.
    """
    config = read_config(workdir)
    for stage in ("train", "sae", "steer") if request.strategy else ("train",):
        check_done(config, workdir, stage, "headsteer deploy" + " --steer" * bool(request.strategy))
    count = count_classes(workdir)
    data = (read_record(workdir, "train") or {})["data"]
    names = tuple(data["classes"])
    check_classes("--classes", request.classes, names)
    labels = np.array(sorted(map(names.index, request.classes or names)), np.int64)
    for split in SPLITS:
        if empty := [names[label] for label in labels if not data[split]["images"][label]]:
            raise HeadSteerError(f"--classes: {empty[0]!r} has no image in {split}; leave it out")
    if request.strategy:
        check_foldable(config, request.alpha)
        find_choice(read_sweep(workdir / "sweep.nc"), request.strategy, labels)
    elif not request.dynamic:
        classes = tuple(names[label] for label in labels)
        check_budget(describe_model(config, classes, tuple(data["image"])), request.goal)
    assert count == len(names)
    check_output(output)
    answered = tuple(names[label] for label in _list_answers(labels, count))
    _check_compared(request.compared, describe_model(config, answered, tuple(data["image"]), dynamic=True))
    return labels


def _list_answers(labels: np.ndarray, count: int) -> np.ndarray:
    """List the classes that a model tells apart: steered towards one class, it still tells all apart."""
    return labels if len(labels) > 1 else np.arange(count)


def _check_compared(directories: Sequence[str], gated: DeployedConfig) -> None:
    """Check that deployed models answer the same question as the run's gated model, and have names of their own.

    Raises:
      HeadSteerError: a directory holds no deployed model, one of other classes, images or sizes, or has the name of
        another.
    """
    for place, directory in enumerate(directories):
        path = Path(expand_path(directory, "--compare", buckets=False))
        described = read_description(path)
        if described.classes != gated.classes:
            raise HeadSteerError(f"--compare={directory}: has other classes; compare models of the same classes")
        same = (described.model, described.image, described.gate or gated.gate) == (
            gated.model,
            gated.image,
            gated.gate,
        )
        if not same:
            raise HeadSteerError(f"--compare={directory}: is of another kind of run; compare models of similar runs")
        _name_compared(path)
        if path.name in {Path(other).name for other in directories[:place]}:
            raise HeadSteerError(f"--compare={directory}: two models are called {path.name!r}; rename a directory")


def _name_compared(path: Path) -> str:
    """Name a deployed model as the figure does, by its kind and the name of its directory."""
    with explain_errors(path / "card.json", REDEPLOY, "missing or damaged"):
        return f"{json.loads((path / 'card.json').read_text(encoding='utf-8'))['what']} ({path.name})"


def _load_compared(directories: Sequence[str]) -> dict[str, DeployedModel]:
    """Load deployed models, by name."""
    paths = [Path(expand_path(directory, "--compare", buckets=False)) for directory in directories]
    return {_name_compared(path): load_deployed(path) for path in paths}


def deploy_run(workdir: Workdir, request: Request, labels: np.ndarray, output: Path, data: str | None) -> None:
    """Make the model that was asked for, and write its directory.

    Args:
      labels: the classes, as `check_request` returns them.
      data: the new path of the data, if they have moved since the run.

    Raises:
      HeadSteerError: the run or its data are damaged, or the disk is full or not writable.
    """
    config, dataset = load_run_dataset(read_config(workdir), workdir, data, "--data=PATH")
    sources = load_sources(config, dataset, workdir, _list_answers(labels, len(dataset.class_names)))
    if request.dynamic:
        steering = load_steering(config, dataset, workdir, request.strategy, labels) if request.strategy else None
        towards = [dataset.class_names[label] for label in labels]
        built = build_dynamic(sources, steering, request.strategy, request.alpha, towards)
    else:
        built = build_specialised(sources, request.goal, request.distil)
    compared = _load_compared(request.compared)
    replace_directory(
        output, lambda directory: write_deployed(built, sources, directory, compared, write_formats, draw_speed)
    )


def load_sources(config: Config, dataset: Dataset, workdir: Workdir, labels: Sequence[int] | np.ndarray) -> Sources:
    """Load the models of a run from which a model for some classes is deployed."""
    phases: tuple[Phase, ...] = (reference_phase(config), "gated")
    models = [load_trained(config, len(dataset.class_names), workdir / "train", phase) for phase in phases]
    sweep = None
    try:
        check_done(config, workdir, "steer", "headsteer deploy")
        sweep = read_sweep(workdir / "sweep.nc")
    except HeadSteerError as error:
        logger.info(f"deploy: without what the stage steer finds ({error})")
    return Sources(models[0], models[1], dataset, workdir.name, np.asarray(labels), sweep)


def load_steering(
    config: Config, dataset: Dataset, workdir: Workdir, strategy: str, labels: np.ndarray
) -> ClassSteering:
    """Load what a strategy changes for some classes, with the run's first autoencoder."""
    trained = load_trained(config, len(dataset.class_names), workdir / "train")
    autoencoders, x_train, _ = read_autoencoders(workdir, trained)
    sae = autoencoders.member(0)
    statistics = latent_statistics(
        encode_split(sae, x_train), dataset.train.labels, len(dataset.class_names), np.asarray(sae.decoder)
    )
    return ClassSteering(sae, statistics.strength, find_choice(read_sweep(workdir / "sweep.nc"), strategy, labels))
