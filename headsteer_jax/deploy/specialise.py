"""A smaller model for some classes of a run: what stays, made up for without training, and chosen on validation.

The classifier keeps the classes. Each sublayer is measured at several sizes (`selection.py`), the sizes within a budget
are chosen, and the projections and the classifier are fitted anew (`refit.py`). All of it sees training images only,
except that validation images choose the budget, if none is given, and the classifier's penalty.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from headsteer_jax.deploy.cost import count_tokens
from headsteer_jax.deploy.images import Answers, ClassImages, answer_images, draw_images
from headsteer_jax.deploy.model import DeployedConfig, DeployedModel
from headsteer_jax.deploy.proposals import Proposals
from headsteer_jax.deploy.refit import refit_classifier, refit_model
from headsteer_jax.deploy.selection import Options, choose_sizes, least_budget, measure_options
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime.progress import progress

logger = logging.getLogger(__name__)

CALIBRATION_ROWS = 32_768  # tokens of training images from which projections are fitted
SCORED_IMAGES = 128  # training images on which every size of every sublayer is tried
BUDGET_STEP = 0.025  # between the budgets that --max-loss tries


Candidate = tuple[DeployedModel, Answers]  # the cut model, and its answers on validation


class Goal(NamedTuple):
    """How small the model shall be: a budget, or the smallest that keeps the accuracy."""

    budget: float | None  # the most multiply-accumulates, as a share of the dense model's
    max_loss: float  # without a budget: the most accuracy on validation that may be lost


class Specialised(NamedTuple):
    """A model for some classes."""

    model: DeployedModel  # cut
    dense: DeployedModel  # the dense model, for the same classes
    validation: Answers
    dense_validation: Answers


def check_budget(config: DeployedConfig, goal: Goal) -> None:
    """Check that a budget can be met.

    Args:
      config: of the model from which nothing is cut.

    Raises:
      HeadSteerError: what cannot be cut costs more.
    """
    least = least_budget(config)
    if goal.budget is not None and goal.budget < least:
        raise HeadSteerError(
            f"--budget={goal.budget:g}: cannot be met; the least is {np.ceil(least * 1e4) / 1e4:g}, because the "
            "embedding of the patches and the classifier cannot be cut"
        )


def specialise(
    model: DeployedModel, images: ClassImages, goal: Goal, propose_heads: Proposals, seed: int
) -> Specialised:
    """Make a smaller model for the classes of some images.

    Args:
      model: the dense model with the classifier of these classes; nothing is cut from it.
      propose_heads: layer -> sets of heads to try beside those that the least-squares order gives.
      seed: draws the training images.
    """
    model = DeployedModel(model.config, jax.device_put(model.params))
    most = max(1, CALIBRATION_ROWS // count_tokens(model.config))
    calibration, scored = (draw_images(images.train, count, seed)[0] for count in (most, SCORED_IMAGES))
    with progress(2 * model.config.depth, "deploy: sizes of the sublayers", "sublayer") as bar:
        options = measure_options(model, calibration, scored, propose_heads, lambda: bar.update(1))
    dense_validation = answer_images(model, images.validation, "deploy: validation")

    def try_budget(budget: float) -> Candidate:
        cut, answers = _cut_to_budget(model, images, options, calibration, budget)
        logger.info(
            f"deploy: budget {budget:.3f}: validation accuracy {answers.accuracy:.4f} "
            f"(dense {dense_validation.accuracy:.4f})"
        )
        return cut, answers

    if goal.budget is not None:
        cut, answers = try_budget(goal.budget)
    else:
        floor = dense_validation.accuracy - goal.max_loss
        cut, answers = _search_budget((model, dense_validation), try_budget, floor)
    return Specialised(cut, model, answers, dense_validation)


def _cut_to_budget(
    model: DeployedModel, images: ClassImages, options: Options, calibration: np.ndarray, budget: float
) -> Candidate:
    """Choose the sizes for a budget, cut the model and refit what stays."""
    cut = refit_model(model, choose_sizes(model.config, options, budget), calibration)
    train, validation = (answer_images(cut, split, "deploy: answers") for split in (images.train, images.validation))
    cut = refit_classifier(cut, (train.cls, images.train.labels), (validation.cls, images.validation.labels))
    return cut, answer_images(cut, images.validation, "deploy: validation")


def _search_budget(uncut: Candidate, try_budget: Callable[[float], Candidate], floor: float) -> Candidate:
    """Find the smallest budget whose model keeps the accuracy on validation, by bisection.

    Accuracy need not fall steadily with the budget; then the result keeps it all the same, but may not be the smallest.

    Args:
      uncut: the model from which nothing is cut, which is the result if no other keeps the accuracy.
    """
    budgets = np.arange(1.0, least_budget(uncut[0].config), -BUDGET_STEP)
    low, high, best = 0, len(budgets), uncut
    while high - low > 1:
        middle = (low + high) // 2
        tried = try_budget(float(budgets[middle]))
        if tried[1].accuracy >= floor:
            low, best = middle, tried
        else:
            high = middle
    return best
