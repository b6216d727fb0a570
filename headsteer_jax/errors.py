"""The package's exception, whose message is one line, and the context manager that turns other errors into it."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

FULL_DISK = "the disk is full; what was saved before is intact: free some space and run the same command"
UNREACHABLE_REASONS = re.compile(
    "ABORTED|UNAVAILABLE|UNAUTHENTICATED|PERMISSION_DENIED|DEADLINE_EXCEEDED|.*Invalid GCS bucket"
)
TENSORSTORE_DETAILS = re.compile(r" \[(?:tensorstore_spec|source locations|os_error_code)")
DAMAGE = (ValueError, KeyError, TypeError, TimeoutError, OSError)  # what libraries raise for a file that is not right
DENIED = (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EPERM, errno.EEXIST)


class HeadSteerError(Exception):
    """A mistake or failure outside the program; its message is one line that names the culprit and the remedy."""


@contextmanager
def explain_errors(culprit: object, remedy: str = "", fault: str = "") -> Iterator[None]:
    """Turn any error of a library or the operating system into one line: `culprit: fault (reason); remedy`.

    A full disk and an unreachable bucket are recognised and get remedies of their own.

    Args:
      culprit: the file, directory or dataset that the line begins with.
      remedy: what the user can do. If it is empty, only a full disk, an unreachable bucket and a path that is not
        writable are explained; every other error is raised as it is.
      fault: what is wrong with a file; if it is empty, the error's own reason stands alone. With a fault, only errors
        that a damaged file can cause are explained.

    Raises:
      HeadSteerError: in place of the error; a HeadSteerError from the body of the context passes unchanged.
    """
    try:
        yield
    except (HeadSteerError, MemoryError):
        raise
    except Exception as error:  # TensorStore reports a full disk as a ValueError with the system's text
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise HeadSteerError(f"{culprit}: {FULL_DISK}") from error
        reason = TENSORSTORE_DETAILS.split(str(error).strip().partition("\n")[0])[0] or type(error).__name__
        in_bucket = str(culprit).startswith("gs:")
        if in_bucket and (isinstance(error, TimeoutError) or UNREACHABLE_REASONS.match(reason)):
            advice = "check the network, the bucket's name and your rights to it"
            raise HeadSteerError(f"{culprit}: cannot be reached ({reason}); {advice}") from None
        denied = getattr(error, "errno", None) in DENIED or "Permission denied" in str(error)
        if denied and not in_bucket and (fault or not remedy):
            raise HeadSteerError(f"{culprit}: not writable; choose another --workdir") from error
        if fault and not isinstance(error, DAMAGE):
            raise
        if remedy:
            raise HeadSteerError(f"{culprit}: {f'{fault} ({reason})' if fault else reason}; {remedy}") from None
        raise
