"""The checks before a run writes anything: of its workdir, data, backbone, autoencoder, devices and disk space."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path as LocalPath
from typing import Any

import jax
from etils.epath import Path

from headsteer_jax.analysis.front import list_budgets
from headsteer_jax.books import Plan, Stage, check_directory, is_broken_link, read_record
from headsteer_jax.config.paths import expand_path
from headsteer_jax.config.schema import Config
from headsteer_jax.data.checks import check_input_range, verify_images, warn_of_repeated_images
from headsteer_jax.data.dataset import Dataset
from headsteer_jax.data.sources import data_places
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.pretrained import check_backbone
from headsteer_jax.runtime import hosts, mesh
from headsteer_jax.runtime.files import Workdir, is_in_bucket
from headsteer_jax.runtime.staging import first_parts, is_stage_directory, locate_new, locate_removed
from headsteer_jax.sae.imported import import_autoencoder
from headsteer_jax.steer.gates import LayerGates
from headsteer_jax.steer.sweep import check_strategies_and_classes, check_validation
from headsteer_jax.train.dense_from import check_dense_from
from headsteer_jax.train.loop import abstract_params
from headsteer_jax.train.losses import check_budget
from headsteer_jax.train.tracker import check_logger

REPOSITORIES = (".git", ".hg", ".svn")
OTHER_NAMES = ("config.json", "activations")  # what a run writes beside the stages' directories and products
OTHER_FILES = ("config.json", ".lock")  # those that are files


def check_workdir(config: Config, workdir: Workdir, stages: Sequence[Stage]) -> None:
    """Check that a run may write into a workdir: that it overwrites nothing and does not overlap the data.

    Args:
      stages: all stages that a run can have.

    Raises:
      HeadSteerError: it is a file, the home directory, the root of a disk or repository, or overlaps the data; or no
        run was started there, but a file that the run would write exists.
    """
    path = workdir.path
    if is_in_bucket(path):
        return
    if path.exists() and not path.is_dir():
        raise HeadSteerError(f"{path}: is a file; choose a directory as --workdir")
    if is_broken_link(path):
        raise HeadSteerError(f"{path}: is a broken link; correct it, or choose another --workdir")
    resolved = LocalPath(os.path.realpath(path))
    if resolved in (LocalPath(os.path.realpath(os.path.expanduser("~"))), LocalPath(resolved.anchor)):
        raise HeadSteerError(f"{path}: is a home directory or the root of a disk; choose a directory of its own")
    for name in REPOSITORIES:
        if (resolved / name).exists():
            raise HeadSteerError(f"{path}: is the root of a repository ({name}); choose a directory of its own")
    cache = config.machine.activation_cache
    for place in map(LocalPath, map(os.path.realpath, data_places(config.data))):
        if _is_within(resolved, place) or _is_within(place, resolved):
            raise HeadSteerError(f"{path}: overlaps the data in {place}; choose a --workdir apart from the data")
        if cache and not is_in_bucket(cache) and _is_within(LocalPath(os.path.realpath(expand_path(cache, ""))), place):
            raise HeadSteerError(
                f"config.machine.activation_cache = {cache!r}: lies in the data in {place}; choose another directory"
            )
    for stage in stages:
        check_directory(path / stage.name)
        for directory in (locate_new(workdir, stage.name), locate_removed(workdir, stage.name)):
            check_directory(directory)
    for name in OTHER_FILES:
        if (path / name).is_dir() or is_broken_link(path / name):
            raise HeadSteerError(f"{path / name}: is not a file, but a run writes one there; choose another --workdir")
    if any(is_stage_directory(path / stage.name) for stage in stages):
        return
    for name in (*OTHER_NAMES, *first_parts([product for stage in stages for product in stage.products])):
        if (path / name).exists():
            raise HeadSteerError(
                f"{path / name}: exists, but no run was started in {path}; choose another --workdir, so that nothing "
                "is overwritten"
            )


def _is_within(path: LocalPath, place: LocalPath) -> bool:
    """Say whether a path is a place or lies below it, even if they differ in case or by a mount."""
    above = (path, *path.parents)
    return place in above or (place.exists() and any(parent.exists() and parent.samefile(place) for parent in above))


def check_products(workdir: Workdir, plans: Sequence[Plan]) -> None:
    """Check that what the stages write outside of their directories replaces nothing but their own earlier results.

    Raises:
      HeadSteerError: a file is there, and the stage was never begun; or there is something other than a file.
    """
    for plan in plans:
        begun = read_record(workdir, plan.stage.name) is not None
        for product in plan.stage.products if plan.action != "nothing" else ():
            path = workdir.path / product
            if path.parent.exists() and not path.parent.is_dir():
                raise HeadSteerError(f"{path.parent}: is not a directory, but a run makes one there; move it elsewhere")
            if path.is_dir() or is_broken_link(path) or is_broken_link(path.parent):
                raise HeadSteerError(f"{path}: is not a file, but a run writes one there; move it elsewhere")
            if path.exists() and not begun:
                raise HeadSteerError(
                    f"{path}: exists, but the stage {plan.stage.name} was not begun in {workdir.path}; move it "
                    "elsewhere, so that nothing is overwritten"
                )


def check_dataset(config: Config, dataset: Dataset) -> None:
    """Check that a dataset suits the config.

    Raises:
      HeadSteerError: a strategy or a class does not exist, validation has too few images, or the gates cannot reach
        gate.budget.
    """
    check_budget(config, len(dataset.class_names))
    check_strategies_and_classes(config, dataset)
    check_validation(dataset.validation, config, dataset.class_names)


def check_plans(config: Config, dataset: Dataset, workdir: Workdir, plans: Sequence[Plan]) -> None:
    """Check what the stages that will run need, before anything is written.

    Raises:
      HeadSteerError: a file that is not a stage's would be overwritten; an image, the backbone or the autoencoder
        cannot be read or does not suit the config; the model sees values out of range; a batch cannot be divided among
        the devices; the gates cannot reach a budget; a package is missing; or the disk has too little space.
    """
    hosts.on_first_process(lambda: check_products(workdir, plans))
    actions = {plan.stage.name: plan.action for plan in plans}
    if any(actions.get(name, "nothing") != "nothing" for name in ("train", "front")):
        hosts.on_first_process(lambda: check_logger(config))
    if actions.get("train", "nothing") != "nothing" and not _has_begun(workdir, "train", actions["train"]):
        _check_training(config, dataset, workdir)
    if any(actions.get(name, "nothing") != "nothing" for name in ("sae", "steer", "layers")):
        check_steerable(config)
    if actions.get("front", "nothing") != "nothing":
        list_budgets(config, len(dataset.class_names))
    if actions.get("sae", "nothing") != "nothing" and config.sae.pretrained:
        hosts.on_every_process(lambda: import_autoencoder(config))


def check_steerable(config: Config) -> None:
    """Check that gates of some kind read the CLS residual, which the sweep steers.

    Raises:
      HeadSteerError: only patches are gated.
    """
    if not LayerGates(config, config.sae_layer).count:
        raise HeadSteerError(
            f"config.gate.kinds = {config.gate.kinds!r}: steering needs gates that read the CLS residual; add heads or "
            "sublayers, or choose --stages=train"
        )


def _has_begun(workdir: Workdir, name: str, action: str) -> bool:
    """Say whether a stage has begun and will continue."""
    directory = workdir / name if action == "make" else locate_new(workdir, name)
    return is_stage_directory(directory)


def _check_training(config: Config, dataset: Dataset, workdir: Workdir) -> None:
    """Check what training needs: see `check_plans`."""
    count, batch = len(dataset.train.labels), config.train.batch
    if batch > count:
        raise HeadSteerError(f"config.train.batch = {batch}: must be at most the {count} training images")
    mesh.check_batch(config, mesh.training_mesh(config.machine))
    if config.train.dense_from:
        hosts.on_every_process(lambda: check_dense_from(config))
    if config.model.pretrained:
        hosts.on_every_process(lambda: check_backbone(config, dataset.class_names))
    needed = checkpoint_bytes(config, abstract_params(config, len(dataset.class_names)))
    hosts.on_first_process(lambda: check_space(workdir.path, needed))
    hosts.on_every_process(lambda: verify_images(dataset))
    hosts.on_every_process(lambda: check_input_range(dataset, config.data))
    if hosts.is_first_process():
        warn_of_repeated_images(dataset)


def checkpoint_bytes(config: Config, params: Any) -> int:
    """Estimate the bytes of a training's checkpoints: for each phase, parameters with Adam's two moments and averages.

    A phase keeps machine.keep of them while the next is written, and the best parameters.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    state = (3 + (config.train.ema > 0)) * size
    phases = (config.train.dense.steps > 0) + 1 + config.train.dense_control
    return int(phases * (config.machine.keep * state + 2 * size) + state)


def check_space(path: Path, needed: int) -> None:
    """Check that the disk has `needed` bytes left for a directory, which need not exist yet.

    Raises:
      HeadSteerError: it has fewer.
    """
    if is_in_bucket(path):
        return
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise HeadSteerError(
            f"{path}: training needs about {needed / 2**20:.0f} MiB for its checkpoints, and the disk has "
            f"{free / 2**20:.0f} MiB left; free some space, lower config.machine.keep, or choose another --workdir"
        )
