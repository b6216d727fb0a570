"""Workdirs by their paths, with a first look into a bucket.

Missing credentials or a missing network thus give a one-line error at the start.
"""

import threading

from etils.epath import Path

from headsteer_jax.config.paths import expand_path
from headsteer_jax.errors import HeadSteerError, explain_errors
from headsteer_jax.runtime.files import Workdir, is_in_bucket

REACH_SECONDS = 30.0  # libraries retry for minutes


def open_workdir(path: str, name: str) -> Workdir:
    """Make the record of a run's directory, which may be in a bucket and need not exist.

    Args:
      path: as it was given.
      name: what it was given as, such as --workdir, for the error.

    Raises:
      HeadSteerError: the path is of a kind that is not supported, or the bucket cannot be reached.
    """
    workdir = Workdir(Path(expand_path(path, name)))
    check_reachable(workdir.path)
    return workdir


def check_reachable(path: Path) -> None:
    """Look into a bucket if the path is in one.

    Raises:
      HeadSteerError: the bucket does not answer in time, or refuses; or gcsfs is not installed.
    """
    if not is_in_bucket(path):
        return
    failures: list[BaseException | None] = []

    def look() -> None:
        try:
            path.exists()
        except BaseException as error:
            failures.append(error)
        else:
            failures.append(None)

    thread = threading.Thread(target=look, daemon=True)  # a daemon, because it may go on retrying
    thread.start()
    thread.join(REACH_SECONDS)
    with explain_errors(path):
        if not failures:
            raise TimeoutError(f"no answer within {REACH_SECONDS:.0f} s")
        if isinstance(failures[0], ImportError):
            raise HeadSteerError(f"{path}: a bucket needs the extra gcs: pip install 'headsteer-jax[gcs]'")
        if failures[0] is not None:
            raise failures[0]
