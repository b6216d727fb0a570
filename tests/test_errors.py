"""Errors of libraries and the operating system become one line, which blames the right thing."""

import errno
from pathlib import Path

import pytest

from headsteer_jax.errors import HeadSteerError, explain_errors

DAMAGED = {"fault": "truncated or damaged", "remedy": "delete it"}
TENSORSTORE = "Error opening: Invalid JSON [tensorstore_spec='{\"context\": {}}'] [source locations='a.cc:1']"


@pytest.mark.parametrize(
    ("culprit", "error", "arguments", "line"),
    [
        ("/w", OSError(errno.ENOSPC, "full"), {}, "/w: the disk is full; what was saved before is intact"),
        ("/w", ValueError("write: No space left on device"), DAMAGED, "/w: the disk is full;"),
        ("/w", PermissionError(errno.EACCES, "no"), {}, "/w: not writable; choose another --workdir"),
        # TensorStore's word for a local directory that may not be read is that of a bucket
        ("/w", ValueError("PERMISSION_DENIED: local file: Permission denied"), DAMAGED, "/w: not writable;"),
        ("gs://b/w", ValueError("PERMISSION_DENIED: no rights"), DAMAGED, "gs://b/w: cannot be reached (PERMISSION_D"),
        ("gs://b/w", TimeoutError(), {}, "gs://b/w: cannot be reached (TimeoutError); check the network"),
        ("/w", ValueError(TENSORSTORE), DAMAGED, "/w: truncated or damaged (Error opening: Invalid JSON); delete it"),
        ("/w", RuntimeError("odd"), {"remedy": "replace it"}, "/w: odd; replace it"),
        ("/w", PermissionError(errno.EACCES, "no"), {"remedy": "replace it"}, "/w: [Errno 13] no; replace it"),
    ],
)
def test_the_line(culprit: str, error: Exception, arguments: dict[str, str], line: str) -> None:
    with pytest.raises(HeadSteerError) as caught, explain_errors(culprit, **arguments):
        raise error
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (RuntimeError("UNAVAILABLE: a task is unhealthy"), {}),  # another host died: a local workdir is not to blame
        (RuntimeError("boom"), DAMAGED),  # a fault of the program does not make the user delete a good file
        (MemoryError(), DAMAGED),
        (KeyError("x"), {}),
        (HeadSteerError("a line already"), DAMAGED),
    ],
)
def test_an_error_that_is_not_understood_passes(error: Exception, arguments: dict[str, str]) -> None:
    with pytest.raises(type(error)) as caught, explain_errors("/w", **arguments):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("number", "filename", "arguments", "line"),
    [
        # the file that the operating system names is to blame, not the directory that the work is for
        (errno.EACCES, "/data/train", {}, "/data/train: not writable; check its rights"),
        (errno.EACCES, "/w/train/a", {}, "/w/train/a: not writable; choose another --workdir"),
        (errno.EROFS, b"/w/train/a", DAMAGED, "/w/train/a: not writable; choose another --workdir"),
        (errno.EDQUOT, "/w/a", DAMAGED, "/w/a: your quota of disk space is used up; what was saved before is intact"),
        (errno.EMFILE, "/w/a", {"remedy": "replace it"}, "/w/a: too many files are open; raise the limit"),
        (errno.ENFILE, None, {}, "/w: too many files are open on this machine"),
        (errno.EIO, "/w/a", DAMAGED, "/w/a: the device failed to read or write"),
        (errno.ESTALE, "/w/a", {}, "/w/a: the file server"),
        (errno.ENAMETOOLONG, "/w/aaa", {}, "/w/aaa: the name is too long"),
        (errno.ELOOP, "/w/a", {}, "/w/a: its symbolic links form a loop"),
        (errno.ENOENT, "/w/a", {}, "/w/a: it is missing, or was removed meanwhile"),
        (errno.ENOENT, "/w/a", DAMAGED, "/w: truncated or damaged ([Errno 2]"),
    ],
)
def test_an_error_of_the_system(number: int, filename: object, arguments: dict[str, str], line: str) -> None:
    with pytest.raises(HeadSteerError) as caught, explain_errors("/w", **arguments):
        raise OSError(number, "text", filename)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_what_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rights are pretended, because root may read everything."""
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(tmp_path))
    with pytest.raises(HeadSteerError, match=f"{tmp_path}: not readable; give yourself"), explain_errors("/w"):
        raise PermissionError(errno.EACCES, "no", str(tmp_path))
