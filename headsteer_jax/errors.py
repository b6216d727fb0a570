"""The package's exception, whose message is one line, and the context manager that turns other errors into it."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

FULL_DISK = "the disk is full; what was saved before is intact: free some space and run the same command"
# errors of the operating system itself, whatever the program is doing
SYSTEM_ERRORS = {
    errno.ENOSPC: FULL_DISK,
    errno.EDQUOT: FULL_DISK.replace("the disk is full", "your quota of disk space is used up"),
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n 4096) and run the same command",
    errno.ENFILE: "too many files are open on this machine; close some programs and run the same command",
    errno.EIO: "the device failed to read or write; check the disk, then run the same command",
    errno.ESTALE: "the file server has replaced or lost it; mount it again and run the same command",
}
# its errors about a path, if there is no better advice
PATH_ERRORS = {
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one",
    errno.ELOOP: "its symbolic links form a loop; correct them",
    errno.ENOENT: "it is missing, or was removed meanwhile; put it back or run the same command again",
    errno.EISDIR: "it is a directory instead of a file; move it away",
}
SYSTEM_TEXTS = {"No space left": errno.ENOSPC, "Disk quota exceeded": errno.EDQUOT, "Too many open files": errno.EMFILE}
UNREACHABLE_REASONS = re.compile(
    "ABORTED|UNAVAILABLE|UNAUTHENTICATED|PERMISSION_DENIED|DEADLINE_EXCEEDED|.*Invalid GCS bucket"
)
CLOUD_LIBRARIES = ("aiohttp", "gcsfs", "google", "requests")  # all of their errors mean an unreachable bucket
TENSORSTORE_DETAILS = re.compile(r" \[(?:tensorstore_spec|source locations|os_error_code)")
DAMAGE = (ValueError, KeyError, TypeError, TimeoutError, OSError)  # what libraries raise for a file that is not right
DENIED = (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EPERM, errno.EEXIST)


class HeadSteerError(Exception):
    """A mistake or failure outside the program; its message is one line that names the culprit and the remedy."""


@contextmanager
def explain_errors(culprit: object, remedy: str = "", fault: str = "") -> Iterator[None]:
    """Turn any error of a library or the operating system into one line: `culprit: fault (reason); remedy`.

    A full disk, an unreachable bucket and the like are recognised and get remedies of their own. Their line begins with
    the file that the operating system names, if it names one.

    Args:
      culprit: the file, directory or dataset that the line begins with.
      remedy: what the user can do. If it is empty, only errors of the operating system and an unreachable bucket are
        explained; every other error is raised as it is.
      fault: what is wrong with a file; if it is empty, the error's own reason stands alone. With a fault, only errors
        that a damaged file can cause are explained.

    Raises:
      HeadSteerError: in place of the error; a HeadSteerError from the body of the context passes unchanged.
    """
    try:
        yield
    except (HeadSteerError, MemoryError):
        raise
    except Exception as error:
        reason = TENSORSTORE_DETAILS.split(str(error).strip().partition("\n")[0])[0] or type(error).__name__
        in_bucket = str(culprit).startswith("gs:")
        if in_bucket and _is_unreachable(error, reason):
            advice = "check the network, the bucket's name and your rights to it"
            raise HeadSteerError(f"{culprit}: cannot be reached ({reason}); {advice}") from None
        if line := _explain_system_error(error, culprit):
            raise HeadSteerError(line) from error
        if not in_bucket and (fault or not remedy) and (line := _explain_denial(error, culprit)):
            raise HeadSteerError(line) from error
        if not in_bucket and not remedy and (line := _explain_path_error(error, culprit)):
            raise HeadSteerError(line) from error
        if fault and not isinstance(error, DAMAGE):
            raise
        if remedy:
            raise HeadSteerError(f"{culprit}: {f'{fault} ({reason})' if fault else reason}; {remedy}") from None
        raise


def _is_unreachable(error: Exception, reason: str) -> bool:
    """Say whether an error means that a bucket does not answer or refuses."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, TimeoutError) or library in CLOUD_LIBRARIES or bool(UNREACHABLE_REASONS.match(reason))


def _error_number(error: Exception) -> int | None:
    """Return the operating system's number of an error; TensorStore reports a full disk as a ValueError with a text."""
    texts = (number for text, number in SYSTEM_TEXTS.items() if text in str(error))
    return getattr(error, "errno", None) or next(texts, None)


def _blamed_path(error: Exception, culprit: object) -> str:
    """Return the path that the operating system names, else the culprit."""
    path = getattr(error, "filename", None) or culprit
    return os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else str(path)


def _explain_system_error(error: Exception, culprit: object) -> str:
    """Explain in one line what is wrong with the whole system; an empty string if this is another error."""
    number = _error_number(error)
    return f"{_blamed_path(error, culprit)}: {SYSTEM_ERRORS[number]}" if number in SYSTEM_ERRORS else ""


def _explain_denial(error: Exception, culprit: object) -> str:
    """Explain in one line what may not be read or written; an empty string if this is another error."""
    if _error_number(error) not in DENIED and "Permission denied" not in str(error):
        return ""
    path = _blamed_path(error, culprit)
    if os.path.exists(path) and not os.access(path, os.R_OK | (os.X_OK if os.path.isdir(path) else 0)):
        return f"{path}: not readable; give yourself the right to read it (chmod, chown)"
    inside = path == str(culprit) or path.startswith(f"{str(culprit).rstrip('/')}/")
    return f"{path}: not writable; {'choose another --workdir' if inside else 'check its rights (ls -ld)'}"


def _explain_path_error(error: Exception, culprit: object) -> str:
    """Explain in one line what is wrong with a path; an empty string if this is another error."""
    number = _error_number(error) if isinstance(error, OSError) else None
    return f"{_blamed_path(error, culprit)}: {PATH_ERRORS[number]}" if number in PATH_ERRORS else ""
