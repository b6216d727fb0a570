"""From a run's directory to a repository on the hub: what is needed to steer, to explore and to report."""

import fnmatch
import os
from collections.abc import Mapping
from typing import NamedTuple

from headsteer_jax.books import is_done, read_record
from headsteer_jax.config.schema import Config
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.params_file import PARAMS_FILE, encode_params
from headsteer_jax.report.card import render_run_card
from headsteer_jax.runs import check_done, count_classes, read_config
from headsteer_jax.runtime.files import Workdir, is_in_bucket, read_json
from headsteer_jax.runtime.hub import Address, Repository, check_token, find_repository
from headsteer_jax.runtime.staging import MARKERS
from headsteer_jax.stages import STAGES
from headsteer_jax.train.loop import load_trained, reference_phase

NEEDED = ("train", "sae", "steer", "report")  # the stages without which a run is not finished


class PushRequest(NamedTuple):
    """A request to write a run to the hub."""

    address: Address
    private: bool
    overwrite: bool


def check_push(workdir: Workdir, request: PushRequest) -> Repository | None:
    """Check everything that can be wrong before anything is uploaded: the run, the token and the repository.

    Returns:
      The repository as it is; None: there is none yet.

    Raises:
      HeadSteerError: a stage of the run is missing or stale; the address has a revision; huggingface_hub is not
        installed; there is no token or the hub refuses it; the hub cannot be reached; the repository holds something
        other than a run; or it is public but was asked to be private.
    """
    address = request.address
    if address.revision:
        raise HeadSteerError(f"{address}: a run is pushed as the newest commit; leave out @{address.revision}")
    config = read_config(workdir)
    for name in NEEDED:
        check_done(config, workdir, name, "headsteer push")
    check_token(address)
    repository = find_repository(address)
    if repository is None:
        return None
    if not (repository.is_replaceable or request.overwrite):
        raise HeadSteerError(
            f"{address}: exists, and headsteer push did not write it; choose another name, or pass --overwrite to add "
            "the run to it"
        )
    if request.private and not repository.private:
        raise HeadSteerError(
            f"{address}: exists and is public; make it private on its page first, or leave out --private"
        )
    return repository


def check_files(request: PushRequest, repository: Repository | None, files: Mapping[str, str | bytes]) -> None:
    """Check that nothing is replaced that other than a push has written.

    Raises:
      HeadSteerError: it would be.
    """
    if repository is not None and not request.overwrite and (replaced := sorted(repository.foreign & set(files))):
        raise HeadSteerError(
            f"{request.address}: holds {replaced[0]}, which headsteer push did not write; move it there, or pass "
            "--overwrite to replace it"
        )


def collect_files(workdir: Workdir, address: Address) -> dict[str, str | bytes]:
    """Collect what a repository of a run has: by path, a local file or the content.

    Of every finished stage these are its records, its files and its products. Directories of stages are left out: they
    hold checkpoints, traces and TensorBoard's files. In place of the checkpoints, the parameters of the gated model and
    of its dense reference are written. The training residuals that autoencoders.npz has stay: strategies choose latents
    by them, and another machine would compute them with another rounding.

    Raises:
      HeadSteerError: a file is missing or damaged.
    """
    config = read_config(workdir)
    paths = ["config.json"]
    for stage in STAGES.values():
        if not is_done(workdir, stage):
            continue
        patterns = (*MARKERS, *stage.entries)
        paths += sorted(
            f"{stage.name}/{entry.name}"
            for entry in (workdir / stage.name).iterdir()
            if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in patterns) and not entry.is_dir()
        )
        paths += [product for product in stage.products if (workdir / product).exists()]
    files: dict[str, str | bytes] = {}
    for path in paths:
        files[path] = (workdir / path).read_bytes() if is_in_bucket(workdir.path) else os.fspath(workdir / path)
    return {**files, **_encode_models(config, workdir), "README.md": _write_card(workdir, address).encode()}


def _encode_models(config: Config, workdir: Workdir) -> dict[str, bytes]:
    """Encode the parameters of the gated model and of its dense reference, by their paths."""
    phases = dict.fromkeys(("gated", reference_phase(config)))
    classes = count_classes(workdir)
    models = {phase: load_trained(config, classes, workdir / "train", phase) for phase in phases}
    return {f"train/{phase}/{PARAMS_FILE}": encode_params(trained.params) for phase, trained in models.items()}


def _write_card(workdir: Workdir, address: Address) -> str:
    """Write the model card."""
    record = read_record(workdir, "train")
    assert record is not None  # the stage is done
    return render_run_card(read_json(workdir / "summary.json"), record["data"], workdir.name, str(address))
