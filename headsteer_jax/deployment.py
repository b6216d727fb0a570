"""From a run's directory to a deployed model: everything that can be wrong is found before anything is computed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headsteer_jax.analysis.sweep_file import read_sweep
from headsteer_jax.books import is_done
from headsteer_jax.config.paths import expand_path
from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import SPLITS, Dataset, check_classes, hash_description
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
from headsteer_jax.runs import check_done, load_run_dataset, read_config, read_data_record
from headsteer_jax.runtime.files import Workdir
from headsteer_jax.sae.autoencoder import encode_split
from headsteer_jax.sae.store import read_autoencoders
from headsteer_jax.stages import STAGES
from headsteer_jax.steer.strategies import latent_statistics
from headsteer_jax.train.loop import Phase, load_trained, reference_phase


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
    data = read_data_record(workdir)
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
        if is_done(workdir, STAGES["steer"]):  # it proposes heads
            check_done(config, workdir, "steer", "headsteer deploy")
    check_output(output)
    answered = tuple(names[label] for label in _list_answers(labels, len(names)))
    gated = describe_model(config, answered, tuple(data["image"]), dynamic=True)
    _check_compared(request.compared, gated, hash_description(data))
    return labels


def _list_answers(labels: np.ndarray, count: int) -> np.ndarray:
    """List the classes that a model tells apart: steered towards one class, it still tells all apart."""
    return labels if len(labels) > 1 else np.arange(count)


def _check_compared(directories: Sequence[str], gated: DeployedConfig, data: str) -> None:
    """Check that deployed models answer the same question as the run's gated model, and have names of their own.

    Args:
      data: the hash of the run's data: on others, test images of this run may have trained a model.

    Raises:
      HeadSteerError: a directory holds no deployed model, one of other classes, data or sizes, or has the name of
        another.
    """
    names, cuts = set(), {"heads": gated.heads, "neurons": gated.neurons}
    for directory in directories:
        path = Path(expand_path(directory, "--compare", buckets=False)).resolve()
        described, card = read_description(path), _read_card(path)
        if described.classes != gated.classes:
            raise HeadSteerError(f"--compare={directory}: has other classes; compare models of the same classes")
        if card.get("data") != data:
            raise HeadSteerError(
                f"--compare={directory}: was made from other data, or by an older HeadSteer; compare models whose runs "
                "have the same data and data.seed"
            )
        uncut = described.model_copy(update=cuts | {"gate": gated.gate})
        if uncut != gated or described.gate not in (None, gated.gate):
            raise HeadSteerError(f"--compare={directory}: is of another kind of run; compare models of similar runs")
        if path.name in names:
            raise HeadSteerError(f"--compare={directory}: two models are called {path.name!r}; rename a directory")
        names.add(path.name)


def _read_card(path: Path) -> dict[str, Any]:
    """Read the card of a deployed model."""
    with explain_errors(path / "card.json", REDEPLOY, "missing or damaged"):
        card: dict[str, Any] = json.loads((path / "card.json").read_text(encoding="utf-8"))
        if not isinstance(card, dict) or "what" not in card:
            raise ValueError("it is not a card")
    return card


def _load_compared(directories: Sequence[str]) -> dict[str, DeployedModel]:
    """Load deployed models, by what the figure calls them: their kind and the name of their directory."""
    paths = [Path(expand_path(directory, "--compare", buckets=False)).resolve() for directory in directories]
    return {f"{_read_card(path)['what']} ({path.name})": load_deployed(path) for path in paths}


def deploy_run(workdir: Workdir, request: Request, labels: np.ndarray, output: Path, data: str | None) -> None:
    """Make the model that was asked for, and write its directory.

    Args:
      labels: the classes, as `check_request` returns them.
      data: the new path of the data, if they have moved since the run.

    Raises:
      HeadSteerError: the run or its data are damaged, or the disk is full or not writable.
    """
    config, dataset = load_run_dataset(read_config(workdir), workdir, data, "--data=PATH")
    compared = _load_compared(request.compared)
    sources = load_sources(config, dataset, workdir, _list_answers(labels, len(dataset.class_names)))
    if request.dynamic:
        steering = load_steering(config, dataset, workdir, request.strategy, labels) if request.strategy else None
        towards = [dataset.class_names[label] for label in labels]
        built = build_dynamic(sources, steering, request.strategy, request.alpha, towards)
    else:
        built = build_specialised(sources, request.goal, request.distil)
    replace_directory(
        output, lambda directory: write_deployed(built, sources, directory, compared, write_formats, draw_speed)
    )


def load_sources(config: Config, dataset: Dataset, workdir: Workdir, labels: Sequence[int] | np.ndarray) -> Sources:
    """Load the models of a run from which a model for some classes is deployed."""
    phases: tuple[Phase, ...] = (reference_phase(config), "gated")
    models = [load_trained(config, len(dataset.class_names), workdir / "train", phase) for phase in phases]
    sweep, data = None, hash_description(read_data_record(workdir))
    if is_done(workdir, STAGES["steer"]):
        sweep = read_sweep(workdir / "sweep.nc")
    return Sources(models[0], models[1], dataset, workdir.name, np.asarray(labels), data, sweep)


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
