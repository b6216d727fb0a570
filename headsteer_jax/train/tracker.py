"""Weights & Biases: a run there that receives the rows of a training's log (machine.logger)."""

import logging
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from etils.epath import Path

from headsteer_jax.config.schema import Config
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime.files import is_in_bucket, make_directory, read_json, write_json

logger = logging.getLogger(__name__)

DIRECTORY = "wandb"  # in a training's directory: the id of its run, and wandb's own files
PROJECT = "headsteer"  # unless WANDB_PROJECT names another


def import_wandb() -> Any:
    """Import wandb.

    Raises:
      HeadSteerError: it is not installed.
    """
    try:
        import wandb
    except ImportError:
        wandb = None
    if not hasattr(wandb, "init"):  # a directory wandb/ of its files can be imported too, as an empty package
        raise HeadSteerError(
            "config.machine.logger = 'wandb': needs the extra wandb: pip install 'headsteer-jax[wandb]'"
        )
    return wandb


def check_logger(config: Config) -> None:
    """Check that the package that machine.logger needs is installed.

    Raises:
      HeadSteerError: it is not.
    """
    if config.machine.logger == "wandb":
        import_wandb()


class Tracker:
    """A run of Weights & Biases; a resumed training continues it, by the id that is kept in its directory."""

    def __init__(self, directory: Path, config: Config) -> None:
        """Start or continue the run of the training in `directory`.

        Raises:
          HeadSteerError: wandb is not installed, there is no login, or the server cannot be reached.
        """
        wandb, file = import_wandb(), make_directory(directory / DIRECTORY) / "run.json"
        if not file.exists():
            write_json(file, {"id": uuid.uuid4().hex[:8]})
        own_files = tempfile.gettempdir() if is_in_bucket(directory) else os.fspath(directory)
        try:
            self._run = wandb.init(
                id=read_json(file)["id"], resume="allow", dir=own_files, config=config.model_dump(mode="json"),
                project=os.environ.get("WANDB_PROJECT", PROJECT), name=_name_run(directory),
                settings=wandb.Settings(silent=True, console="off"),
            )  # fmt: skip
        except Exception as error:  # wandb.Error, and other types for a wrong WANDB_MODE and the like
            reason = " ".join(str(error).split())[:160]
            raise HeadSteerError(
                f"config.machine.logger = 'wandb': Weights & Biases does not start ({reason}); log in with wandb "
                "login, check the network, or set WANDB_MODE=offline"
            ) from None
        self._phases, self._has_failed = set[str](), False
        logger.info(f"wandb: {self._run.url or self._run.dir}")

    def write(self, phase: str, step: int, scalars: dict[str, float]) -> None:
        """Write numbers by their tags, which begin with the phase; each phase has an axis of steps of its own."""
        axis = f"{phase}/step"
        with self._outlive_failure():
            if phase not in self._phases:
                self._run.define_metric(f"{phase}/*", step_metric=axis)
                self._phases.add(phase)
            self._run.log(scalars | {axis: step})

    def close(self, failed: bool) -> None:
        """Send what is left, and end the run.

        Args:
          failed: whether the training ends with an error.
        """
        with self._outlive_failure():
            self._run.finish(exit_code=int(failed))

    @contextmanager
    def _outlive_failure(self) -> Iterator[None]:
        """Let a training go on without its curves if wandb fails; only the first failure is said."""
        try:
            yield
        except Exception as error:  # of its service process or of the network, in many types
            if not self._has_failed:
                logger.warning(f"wandb: {' '.join(str(error).split())[:160]}; training goes on without it")
            self._has_failed = True


def _name_run(directory: Path) -> str:
    """Name a run after its training's directory and the one above it, as in double_digits/train."""
    name = directory.name.removeprefix(".").removesuffix(".new")  # a stage that is computed again
    return f"{directory.parent.name}/{name}"
