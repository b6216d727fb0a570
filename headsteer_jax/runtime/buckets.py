"""A first look into a bucket, so that missing credentials or a missing network give a one-line error at the start."""

import threading

from etils.epath import Path

from headsteer_jax.errors import HeadSteerError, explain_errors
from headsteer_jax.runtime.files import is_in_bucket

REACH_SECONDS = 30.0  # libraries retry for minutes


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
