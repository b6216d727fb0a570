"""The lock of a directory: file systems without locks do not stop a run, other failures are one line."""

import builtins
import errno
import fcntl
import logging
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime.lock import hold_lock


def test_two_runs_in_one_directory(tmp_path: Path) -> None:
    other = hold_lock(epath.Path(tmp_path))
    with hold_lock(epath.Path(tmp_path)), pytest.raises(HeadSteerError, match="another run is writing here"), other:
        pass
    with hold_lock(epath.Path(tmp_path)):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(logging.getLogger("headsteer_jax"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="headsteer_jax"), hold_lock(epath.Path(tmp_path)):
        assert f"{tmp_path}: no lock can be held here" in caplog.text


def test_an_operating_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_import = builtins.__import__

    def without_fcntl(name: str, *arguments: Any) -> Any:
        if name == "fcntl":
            raise ImportError(name)
        return plain_import(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_fcntl)
    with hold_lock(epath.Path(tmp_path)):
        pass


@pytest.mark.parametrize(
    ("number", "text"), [(errno.EACCES, "not writable"), (errno.EROFS, "not writable"), (errno.EIO, "failed to read")]
)
def test_a_lock_that_is_refused(number: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(HeadSteerError, match=text), hold_lock(epath.Path(tmp_path)):
        pass


def test_an_error_of_the_body_is_not_one_of_the_lock(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="of the body"), hold_lock(epath.Path(tmp_path)):
        raise OSError(errno.ENOSYS, "of the body")
