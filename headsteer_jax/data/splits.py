"""Splits as their makers publish them: which one is train, validation and test, by their names and labels."""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from headsteer_jax.data.dataset import Split
from headsteer_jax.data.names import normalise_name
from headsteer_jax.errors import HeadSteerError

logger = logging.getLogger(__name__)

# The names that makers give their splits, the usual one first; case is ignored.
TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "validation", "valid", "dev")
TEST_NAMES = ("test", "testing")
USUAL_NAMES = (*TRAIN_NAMES, *VALIDATION_NAMES, *TEST_NAMES)


class RawData(NamedTuple):
    """A published dataset, before anything is cut from train."""

    train: Split
    test: Split | None  # None: it is cut from train
    class_names: tuple[str, ...]
    related: np.ndarray | None = None  # [C, C] bool; None if nothing is known
    validation: Split | None = None  # None: it is cut from train


class SplitNames(NamedTuple):
    """The published names of the three splits; an empty one is cut from train."""

    train: str
    validation: str
    test: str


def choose_splits(
    origin: str, labelled: Sequence[str], unlabelled: Mapping[str, str], configured: Sequence[str]
) -> SplitNames:
    """Choose the published splits that become train, validation and test; log this and the splits that are passed over.

    Args:
      origin: the dataset's name in errors and in the log.
      labelled: the names of the published splits with labels.
      unlabelled: the other published splits, each with the reason why it has no labels.
      configured: config.data.splits: the names of train and test; or of train, validation and test; or of one split
        from which all three are cut. If it is empty, the usual names are used.

    Raises:
      HeadSteerError: there is no such split, or it has no labels; or no usual name is there.
    """
    if configured:
        chosen = [_find_named(origin, name, labelled, unlabelled) for name in configured]
        names = SplitNames(chosen[0], chosen[1] if len(chosen) == 3 else "", chosen[-1] if len(chosen) > 1 else "")
    else:
        train, validation, test = (find_by_role(labelled, role) for role in (TRAIN_NAMES, VALIDATION_NAMES, TEST_NAMES))
        if not train:
            raise HeadSteerError(
                f"{origin}: there is no split 'train' with labels; {_list_splits(labelled, unlabelled)}; "
                "name others in config.data.splits"
            )
        if not test:
            validation, test = "", validation
        if not test:
            raise HeadSteerError(
                f"{origin}: there is no split 'test' or 'val' with labels; {_list_splits(labelled, unlabelled)}; "
                f"pass --config.data.splits={train} to cut validation and test from {train!r}"
            )
        names = SplitNames(train, validation, test)
    _log_choice(origin, names, labelled, unlabelled)
    return names


def find_by_role(names: Sequence[str], role: Sequence[str]) -> str:
    """Find the name that makers give a role, the most usual one first; empty if there is none."""
    for usual in role:
        for name in sorted(names):
            if name.casefold() == usual:
                return name
    return ""


def _find_named(origin: str, name: str, labelled: Sequence[str], unlabelled: Mapping[str, str]) -> str:
    """Find a split by the name in config.data.splits, ignoring case if necessary."""
    published = (*unlabelled, *labelled)
    found_name = name if name in published else {other.casefold(): other for other in published}.get(name.casefold())
    if found_name is None:
        held = _list_splits(labelled, unlabelled)
        raise HeadSteerError(f"{origin}: there is no split {name!r}, which config.data.splits names; {held}")
    if found_name in unlabelled:
        raise HeadSteerError(
            f"{origin}: the split {found_name!r} of config.data.splits has no labels ({unlabelled[found_name]}); "
            "name one with labels"
        )
    return found_name


def _list_splits(labelled: Sequence[str], unlabelled: Mapping[str, str]) -> str:
    listed = [
        *map(normalise_name, labelled),
        *(f"{normalise_name(name)} ({reason})" for name, reason in unlabelled.items()),
    ]
    return f"it has {', '.join(listed) or 'no split at all'}"


def _log_choice(origin: str, names: SplitNames, labelled: Sequence[str], unlabelled: Mapping[str, str]) -> None:
    """Log which splits are read, and every one that is not."""
    chosen = ", ".join(
        f"{role} from {normalise_name(name)!r}" if name else f"{role} cut from train"
        for role, name in names._asdict().items()
    )
    passed_over = [f"{normalise_name(name)!r} is passed over" for name in labelled if name not in names]
    passed_over += [f"{normalise_name(name)!r} is passed over ({reason})" for name, reason in unlabelled.items()]
    logger.info(f"{origin}: {'; '.join([chosen, *passed_over])}")
