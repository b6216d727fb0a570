"""The front of accuracy and compute: gated models of several budgets, all from the dense phase's end.

Every budget trains the gated phase of the same length, on the same batches, as the run's own gated model. The dense
models of the stage `train` are the references: the one that all start from, and the control of the same length.
"""

import logging
import math
from typing import Any

import numpy as np
from etils.epath import Path

from headsteer_jax.analysis.stats import bootstrap_weights, percentile_interval
from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import Dataset
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.compute import measure_compute, measure_usage
from headsteer_jax.model.macs import count_dense_macs
from headsteer_jax.model.passes import make_observer
from headsteer_jax.model.vit import TrainedModel, build_model
from headsteer_jax.runtime import hosts
from headsteer_jax.train.log import open_log
from headsteer_jax.train.loop import EVALUATION_GATING, Phase, init_params, load_trained, train_phase
from headsteer_jax.train.losses import compute_least_share

logger = logging.getLogger(__name__)

SPREAD = (0.2, 0.4, 0.6, 0.8)  # the places of the default budgets between the least share and 1


def list_budgets(config: Config, classes: int) -> tuple[float, ...]:
    """List the budgets of the front, rising: the config's, or four between the least share of these gates and 1.

    The run's own budget, gate.budget, is always among them, if there is one.

    Raises:
      HeadSteerError: what no gate can switch off costs more than a budget.
    """
    least = compute_least_share(config, classes)
    budgets = config.front.budgets or tuple(round(least + place * (1 - least), 2) for place in SPREAD)
    if min(budgets) < least:
        raise HeadSteerError(
            f"config.front.budgets = {min(budgets)}: must be at least {math.ceil(least * 1e4) / 1e4}, because these "
            "gates cannot switch off the rest; raise it, gate more kinds (config.gate.kinds) or earlier layers "
            "(first_layer)"
        )
    return tuple(sorted({*budgets, config.gate.budget} - {0.0}))


def train_front(config: Config, dataset: Dataset, train_directory: Path, directory: Path) -> dict[str, Any]:
    """Train a gated model for each budget, from its last checkpoint if it has one, and measure all of them on test.

    The budget gate.budget is the run's own model, which is not trained again.

    Args:
      train_directory: of the stage `train`.
      directory: for the checkpoints, one directory a budget.

    Returns:
      The content of front.json, with a row for each budget.

    Raises:
      HeadSteerError: as `train_phase`, or a budget is out of reach.
      Preempted: SIGTERM came; a checkpoint is saved.
    """
    classes = len(dataset.class_names)
    params = _load_start(config, dataset, train_directory)
    models: dict[float, TrainedModel] = {}
    for budget in list_budgets(config, classes):
        budgeted = config.model_copy(update={"gate": config.gate.model_copy(update={"budget": budget})})
        place = train_directory
        if budgeted != config:
            place = directory / "budgets" / f"{budget:g}"
            logger.info(f"front: the budget {budget:g}")
            with open_log(place, budgeted) as log:
                train_phase(build_model(budgeted, classes), params, "gated", dataset, budgeted, place, log)
        models[budget] = load_trained(budgeted, classes, place)
    return _measure_front(config, dataset, models, _find_right_answers(config, dataset, train_directory))


def _load_start(config: Config, dataset: Dataset, train_directory: Path) -> Any:
    """Load the parameters at the end of the dense phase, complete on every host; without that phase, initialise."""
    if config.train.dense.steps:
        return hosts.to_numpy(load_trained(config, len(dataset.class_names), train_directory, "dense").params)
    model = build_model(config, len(dataset.class_names))
    return init_params(model, config, config.seed, dataset.class_names)


def _find_right_answers(config: Config, dataset: Dataset, train_directory: Path) -> dict[Phase, np.ndarray]:
    """Find which test images each dense model answers rightly, [N] bool, for those that were trained."""
    phases: dict[Phase, bool] = {"dense": config.train.dense.steps > 0, "dense_control": config.train.dense_control}
    right: dict[Phase, np.ndarray] = {}
    for phase in (phase for phase, trained in phases.items() if trained):
        dense = load_trained(config, len(dataset.class_names), train_directory, phase)
        observe = make_observer(dense.model, config, EVALUATION_GATING[phase], config.sae_layer)
        observed = observe(dense.params, dataset.test, f"front: {phase}: test")
        right[phase] = observed.prediction == dataset.test.labels
    return right


def _measure_front(
    config: Config, dataset: Dataset, models: dict[float, TrainedModel], references: dict[Phase, np.ndarray]
) -> dict[str, Any]:
    """Measure the models of all budgets on test; intervals are over the test images, paired with the references.

    Args:
      references: of each dense model, [N] bool: is the answer right.
    """
    labels, classes, confidence = dataset.test.labels, len(dataset.class_names), config.steer.confidence
    weights_RN = bootstrap_weights(labels, config.steer.bootstrap, np.random.default_rng([config.seed, 6]))

    def interval(values_N: np.ndarray) -> list[float]:
        means_R = weights_RN @ values_N.astype(np.float32) / len(values_N)
        return [float(end) for end in percentile_interval(means_R, confidence)]

    rows: list[dict[str, Any]] = []
    for budget, trained in models.items():
        observe = make_observer(trained.model, trained.config, "thresholded", config.sae_layer)
        on_validation = observe(trained.params, dataset.validation, f"front: {budget:g}: validation")
        on_test = observe(trained.params, dataset.test, f"front: {budget:g}: test")
        right = on_test.prediction == labels
        row = {
            "budget": budget,
            "accuracy": float(right.mean()),
            "accuracy_ci": interval(right),
            "validation_accuracy": on_validation.accuracy(dataset.validation.labels),
            "layer_usage": {kind: value.tolist() for kind, value in measure_usage(on_test.gates).items()},
        }
        for phase, reference in references.items():
            row[f"{phase}_change_ci"] = interval(right * 1.0 - reference)
        rows.append(row | measure_compute(trained.config, classes, on_test.gates))
    dense: dict[str, Any] = {
        f"{phase}_accuracy": float(references[phase].mean()) if phase in references else None
        for phase in ("dense", "dense_control")
    }
    return {"rows": rows, "images": len(labels), "dense_macs": count_dense_macs(config, classes), **dense}
