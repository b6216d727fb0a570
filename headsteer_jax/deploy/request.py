"""What the command line asks of `headsteer deploy`, checked as far as that needs no run."""

import argparse
from typing import NamedTuple

from headsteer_jax.config.files import parse_names
from headsteer_jax.deploy.specialise import Goal
from headsteer_jax.errors import HeadSteerError

MAX_LOSS = 0.01  # of accuracy on validation, if neither --max-loss nor --budget is given


class Request(NamedTuple):
    """A model that shall be deployed."""

    classes: tuple[str, ...]  # empty: all
    goal: Goal
    distil: int  # steps
    dynamic: bool  # the gated model
    strategy: str = ""  # that steers the gated model; empty: none
    alpha: float = 0.0
    compared: tuple[str, ...] = ()  # directories of other deployed models, whose speed is measured as well


def read_request(flags: argparse.Namespace) -> Request:
    """Read the flags of the command.

    Raises:
      HeadSteerError: a value is out of range, or two flags exclude each other.
    """
    try:
        classes = parse_names(flags.classes or "")
    except ValueError as error:
        raise HeadSteerError(f"--classes={flags.classes}: {error}") from None
    dynamic = flags.dynamic or flags.steer is not None
    _check_ranges(flags)
    _check_together(flags, dynamic)
    if not dynamic and len(classes) < 2 and len(set(classes)) == len(classes):
        raise HeadSteerError(
            f"--classes={flags.classes or ''}: name at least two classes, because a model of one class has nothing to "
            "tell apart"
        )
    if flags.dynamic and flags.steer is None and len(classes) == 1:
        raise HeadSteerError(f"--classes={flags.classes}: name at least two classes, or leave --classes out for all")
    max_loss = MAX_LOSS if flags.max_loss is None else flags.max_loss
    return Request(
        classes, Goal(flags.budget, max_loss), flags.distil or 0, dynamic, flags.steer or "", flags.alpha or 0.0,
        tuple(flags.compare or ()),
    )  # fmt: skip


def _check_ranges(flags: argparse.Namespace) -> None:
    """Check every number by itself."""
    if flags.budget is not None and not 0 < flags.budget <= 1:
        raise HeadSteerError(f"--budget={flags.budget:g}: must be above 0 and at most 1, a share of the dense model's")
    if flags.max_loss is not None and not 0 <= flags.max_loss < 1:
        raise HeadSteerError(f"--max-loss={flags.max_loss:g}: must be from 0 to below 1, a share of the images")
    if flags.distil is not None and flags.distil < 0:
        raise HeadSteerError(f"--distil={flags.distil}: must be a number of steps, 0 or more")
    if flags.alpha is not None and not abs(flags.alpha) < float("inf"):
        raise HeadSteerError(f"--alpha={flags.alpha}: must be a finite number")


def _check_together(flags: argparse.Namespace, dynamic: bool) -> None:
    """Check that the flags that are given go together."""
    if flags.budget is not None and flags.max_loss is not None:
        raise HeadSteerError("--budget and --max-loss: give one of them; each says how much is cut")
    cuts = {"--budget": flags.budget, "--max-loss": flags.max_loss, "--distil": flags.distil}
    for name, value in cuts.items():
        if dynamic and value is not None:
            raise HeadSteerError(f"{name}: leave it out; --dynamic and --steer deploy the gated model, and cut nothing")
    if (flags.steer is None) != (flags.alpha is None):
        raise HeadSteerError("--steer and --alpha: give both, the strategy and its strength, or neither")
