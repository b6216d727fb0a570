"""Image files that a user names: all are listed, and what cannot be read has its reason and stops no other."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from headsteer_jax.data.image_files import list_images, read_images

LONG = "0" * 300 + ".png"


@pytest.fixture(autouse=True)
def _pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write two images and an empty directory, and work there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / name)


@pytest.mark.parametrize("by_lines", [False, True])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.png", "missing.png: no such file; give image files, or directories of them"),
        ("a.png/c.png", "a.png/c.png: no such file; give image files"),
        (LONG, f"{LONG}: the name is too long for this file system; choose a shorter one"),
        ("empty", "empty: there is no image in it; give image files, or directories of them"),
        ("nul\0.png", "nul\\x00.png: "),
        ("caf\udce9.png", "caf\\xe9.png: no such file; give image files"),
    ],
)
def test_one_bad_path_stops_no_other(name: str, reason: str, by_lines: bool) -> None:
    named = ["a.png", name, "b.png"]
    files = list_images(["-"], [f"{text}\n" for text in named]) if by_lines else list_images(named)
    assert [str(file.path) for file in files] == named
    images, errors = read_images(files, (4, 4, 1))
    assert [image.max() for image in images] == [7, 0, 7]
    assert errors[0] == errors[2] == ""
    assert errors[1].startswith(reason)


def test_arguments_that_are_no_paths_of_this_machine_stop_no_other() -> None:
    files = list_images(["gs://bucket/c.png", "a.png", "~no-such-user/c.png", "-"], ["\n"])
    assert [file.error.partition(";")[0] for file in files] == [
        "IMAGE=gs://bucket/c.png: such paths are not supported",
        "",
        "IMAGE=~no-such-user/c.png: there is no user 'no-such-user'",
        "-: standard input names no image",
    ]


def test_names_that_are_not_utf_8_are_read() -> None:
    odd = "caf\udce9.png"
    os.replace("b.png", odd)
    for files in (list_images(["a.png", odd]), list_images(["-"], ["a.png", odd]), list_images(["."])):
        assert [str(file.path) for file in files] == ["a.png", odd]
        assert read_images(files, (4, 4, 1))[1] == ["", ""]


def test_directories_without_the_right_to_enter_stop_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The administrator may enter all of them, so the operating system's answer is made here."""
    for directory in ("closed", "more/closed"):
        Path(directory).mkdir(parents=True)
    os.replace("b.png", "more/b.png")
    stat, scandir = Path.stat, os.scandir

    def refuse(path: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", lambda self, **way: refuse(self) if "closed/" in str(self) else stat(self, **way))
    monkeypatch.setattr(os, "scandir", lambda path: refuse(path) if str(path).endswith("closed") else scandir(path))
    files = list_images(["a.png", "closed/c.png", "more"])
    assert [str(file.path) for file in files] == ["a.png", "closed/c.png", "more/b.png", "more/closed"]
    assert [file.error for file in files] == [
        "",
        "closed/c.png: cannot be reached; give yourself the right to enter its directory (chmod, chown)",
        "",
        "more/closed: the directory cannot be read (Permission denied); "
        "give yourself the right to read it (chmod, chown)",
    ]


@pytest.mark.parametrize("name", ["missing.png", "empty", LONG, "-"])
def test_a_single_path_that_cannot_be_read_has_its_reason(name: str) -> None:
    (file,) = list_images([name])
    assert file.error


def test_images_below_directories_are_listed_in_order() -> None:
    Path("more/deeper").mkdir(parents=True)
    for source, target in (("b.png", "more/deeper/b.PNG"), ("a.png", "more/z.png")):
        os.replace(source, target)
    for name in ("more/notes.txt", "more/.hidden.png"):
        Path(name).write_text("none")
    Path("more/broken.png").symlink_to("nowhere.png")
    assert [str(file.path) for file in list_images(["more"])] == ["more/deeper/b.PNG", "more/z.png"]
