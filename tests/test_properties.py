"""Properties of the command line over random directories, names and configs, and over kills at random moments.

Whatever lies in the workdir and whatever is asked for: there is no traceback, nothing outside of the workdir changes, a
refusal changes nothing at all, and old results are there until the new ones are complete. The stages are small fakes
which write their files through the workdir as the real ones do.
"""

import builtins
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_files import png
from helpers import headsteer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from headsteer_jax import preflight, stages
from headsteer_jax.books import is_done, read_record
from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import Dataset, hash_data
from headsteer_jax.runtime.files import Workdir
from headsteer_jax.runtime.staging import locate_complete, locate_new, redirect_stage
from headsteer_jax.stages import STAGES

CONFIG = """
from builders import tiny_config

def get_config():
    config = tiny_config()
    data = config.data.model_copy(update={"source": "npz", "path": "data/set.npz", "mean": (0.5,), "std": (0.5,)})
    steer = config.steer.model_copy(update={"least_validation": 1})
    return config.model_copy(update={"data": data, "steer": steer})
"""
PRODUCTS = ("summary.json", "report.html", "figures/front.png")  # of the fake report, which makes no other


def checked(examples: int) -> Callable[[Any], Any]:
    """Try so many examples, always the same ones."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=health)


class Killed(BaseException):
    """The process dies here."""


def signature(name: str, config: Config, dataset: Dataset, workdir: Workdir) -> str:
    """Say what a stage's results are computed from, with the results of those that it reads."""
    relevant = {"train": config.train, "sae": config.sae, "steer": config.steer, "layers": config.layers}
    own = relevant.get(name, config.report).model_dump_json()
    read = [workdir / reads / "result" for reads in STAGES[name].reads]
    before = [path.read_text() for path in read if path.exists()] if name != "report" else []
    return json.dumps([name, config.seed, own, hash_data(dataset), *before])


def fake_stage(name: str) -> Callable[[Config, Dataset, Workdir], None]:
    """Make a stage's function that only writes files, the last one of which holds its signature."""

    def run(config: Config, dataset: Dataset, workdir: Workdir) -> None:
        text = signature(name, config, dataset, workdir)
        for product in {"report": PRODUCTS, "steer": ("sweep.nc",)}.get(name, ()):
            path = workdir / product
            path.parent.mkdir(parents=True, exist_ok=True)
            workdir.write_text(product, text)
        (workdir / name / "checkpoints" / "4").mkdir(parents=True, exist_ok=True)
        workdir.write_text(f"{name}/checkpoints/4/x", text)
        workdir.write_text(f"{name}/result", text)

    return run


@pytest.fixture(scope="module", autouse=True)
def fakes() -> Iterator[None]:
    """Let every stage be a fake, and let the costly checks before training pass."""
    with pytest.MonkeyPatch.context() as patch:
        for name, stage in [*STAGES.items()]:
            entries = (*stage.entries, "result", "checkpoints")
            patch.setitem(STAGES, name, dataclasses.replace(stage, run=fake_stage(name), entries=entries))
        patch.setattr(preflight, "_check_training", lambda *_: None)
        patch.setattr(os, "fsync", lambda _: None)  # the slowest part of a fake
        patch.setattr(stages, "package_versions", lambda: dict.fromkeys(stages.PACKAGES, "0"))
        yield


class World:
    """A directory with data, with a config, with a user's other files, and with a workdir `w` that may not exist."""

    def __init__(self, root: Path) -> None:
        self.root, self.workdir = root, root / "w"
        (root / "data").mkdir(parents=True)
        (root / "tiny.py").write_text(CONFIG)
        (root / "precious").mkdir()
        (root / "precious" / "thesis.tex").write_text("the user's")
        (root / "precious" / "train").mkdir()
        (root / "precious" / "train" / "started.json").write_text('{"format": 3}')
        self.write_data(0)

    def write_data(self, variant: int) -> None:
        """Write the data; every variant has other images."""
        rng = np.random.default_rng(variant)
        images = rng.integers(0, 256, (27, 8, 8, 1), np.uint8)
        labels = np.arange(27) % 3
        np.savez(
            self.root / "data" / "set.npz", train_images=images[:18], train_labels=labels[:18],
            test_images=images[18:], test_labels=labels[18:], class_names=np.array(["ant", "bee", "cat"]),
        )  # fmt: skip

    def headsteer(self, *arguments: object, command: str = "run") -> subprocess.CompletedProcess[str]:
        """Run a command here, and check what holds of every command."""
        outside, inside = snapshot(self.root, self.workdir), snapshot(self.workdir)
        result = headsteer(command, *arguments, cwd=self.root)
        assert snapshot(self.root, self.workdir) == outside, result.stderr
        assert result.returncode in (0, 2), result.stderr
        assert "Traceback" not in result.stderr
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == (result.returncode == 2), result.stderr
        if result.returncode == 2:
            assert snapshot(self.workdir) == inside, errors[0]
        return result

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run stages in the workdir."""
        return self.headsteer("--config=tiny.py", "--workdir=w", *arguments)


def snapshot(root: Path, without: Path | None = None) -> dict[str, Any]:
    """Describe everything below a directory, links not followed: kinds, contents and times."""
    if not os.path.lexists(root):
        return {}
    if root.is_symlink() or not root.is_dir():
        return {"": os.readlink(root) if root.is_symlink() else root.read_bytes()}
    found: dict[str, Any] = {"": root.stat().st_mtime_ns if without is None else ""}
    for place, directories, files in os.walk(root):
        if without is not None and Path(place) == without.parent:
            directories[:] = [name for name in directories if name != without.name]
            files = [name for name in files if name != without.name]
        for name in [*directories, *files]:
            path = Path(place, name)
            status = path.lstat()
            content: Any = None
            if path.is_symlink():
                content = os.readlink(path)
            elif path.is_file():
                content = path.read_bytes()
            found[os.path.relpath(path, root)] = (status.st_mode, status.st_mtime_ns, content)
    return found


@pytest.fixture
def make_world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], World]:
    return lambda: World(tmp_path_factory.mktemp("world") / "root")


# Names that runs use, and names of users.
STAGE_NAMES = st.sampled_from([*STAGES])
OUR_NAMES = st.one_of(
    STAGE_NAMES,
    STAGE_NAMES.map(lambda name: f".{name}.new"),
    STAGE_NAMES.map(lambda name: f".{name}.removed"),
    st.sampled_from(["config.json", "sweep.nc", "summary.json", "report.html", "latents.html", "figures",
                     "explorer.html", "activations", ".lock", ".config.json.part", ".git", "started.json", "done.json",
                     "result", "front.png", ".started.json.part", "checkpoints", "notes[1].txt", "notes1.txt"]),
)  # fmt: skip
ANY_NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..")
)
NAMES = st.one_of(OUR_NAMES, OUR_NAMES, ANY_NAMES, st.just("x" * 255))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "format": st.one_of(st.sampled_from([1, 2, 3, 4, 99]), JSON), "config": JSON, "data": JSON, "file": JSON,
        "inputs": JSON, "finished": JSON, "seconds": JSON, "products": JSON,
    },
)  # fmt: skip
CONTENTS = st.one_of(
    JSON.map(json.dumps), RECORDS.map(json.dumps), st.just("{"), st.just("[" * 100_000),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
).map(str.encode) | st.binary(max_size=9)  # fmt: skip
LINKS = st.sampled_from(
    ["nowhere", ".", "..", "../precious", "../precious/train", "../precious/thesis.tex", "train", "sae", "/dev/null"]
)
TREES = st.recursive(
    st.one_of(CONTENTS, LINKS),
    lambda inner: st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)


def plant(path: Path, tree: Any) -> None:
    """Make a file (bytes), a link or a pipe (text), or a directory (a mapping) with everything below it."""
    with contextlib.suppress(OSError):  # a name may be too long for this file system
        if isinstance(tree, bytes):
            path.write_bytes(tree)
        elif tree == "FIFO":
            os.mkfifo(path)
        elif isinstance(tree, str):
            path.symlink_to(tree)
        else:
            path.mkdir(exist_ok=True)
            for name, inner in tree.items():
                plant(path / name, inner)


STAGE_LISTS = st.one_of(
    st.just(()),
    st.lists(STAGE_NAMES, min_size=1, max_size=3).map(lambda names: (f"--stages={','.join(names)}",)),
    st.text(max_size=8).map(lambda text: (f"--stages={text}",)),
)
FLAGS = st.lists(st.sampled_from(["--overwrite", "--seed=1", "--config.sae.k=3", "--config.report.dpi=70"]), max_size=3)


@checked(120)
@given(st.dictionaries(NAMES, TREES, max_size=5), STAGE_LISTS, FLAGS)
@example({"train": "nowhere"}, (), [])
@example({"train": {"started.json": b"[]"}}, (), ["--overwrite"])
@example({"train": {"done.json": b'{"format": 3}'}}, (), ["--overwrite"])
@example({"train": {"done.json": b'{"format": 3, "config": {}, "data": {}, "inputs": {}, "file": {}}'}}, (), [])
@example({"train": {"done.json": {}}, "config.json": b"[]"}, (), [])
@example({".train.new": b"the user's"}, (), [])
@example({".train.new": {"mine": b"the user's"}}, (), [])
@example({".sae.removed": {"mine": b"the user's"}, "train": {"started.json": b"{}"}}, (), ["--overwrite"])
@example({"train": {"started.json": b"{}"}, "report.html": b"the user's"}, (), ["--overwrite"])
@example({"train": {"started.json": b"{}"}, "figures": b"the user's"}, (), ["--overwrite"])
@example({"train": {"started.json": b"{}"}, "summary.json": {"mine": b"the user's"}}, (), ["--overwrite"])
@example({"train": {"started.json": b"{}"}, "config.json": {"mine": b"the user's"}}, (), ["--overwrite"])
@example({".lock": {}}, (), [])
def test_whatever_lies_in_the_workdir(make_world, tree, stage_list, flags):
    world = make_world()
    plant(world.workdir, tree)
    before = snapshot(world.workdir)
    result = world.run(*stage_list, *flags)
    ours = is_ours(world.workdir)
    for name, entry in before.items():  # whatever happened, a user's files are where they were
        if name and isinstance(entry[2], bytes) and not ours(name):
            assert snapshot(world.workdir).get(name, (0, 0, None))[2] == entry[2], (name, result.stderr)


def is_ours(workdir: Path) -> Callable[[str], bool]:
    """Return whether a path in the workdir is a name that a run uses, in a directory that has our marker."""

    def ours(name: str) -> bool:
        first, *rest = Path(name).parts
        if first in (".lock", "config.json", ".config.json.part"):
            return True
        if first.startswith(".") and first.endswith((".new", ".removed")):
            return True
        return first in STAGES and bool(rest)

    return ours


# Config fields: any path, any text.
FIELDS = st.one_of(
    st.sampled_from(sorted(stages.flatten(Config()))),
    st.text(st.characters(exclude_characters="=", exclude_categories=["Cs"]), max_size=10),
)
VALUES = st.one_of(
    st.sampled_from(["", "0", "-1", "1e9", "nan", "inf", "true", "none", "[", "[]", '["a"]', "a,b", "~nobody/x", "gs://",
                     "s3://x/y", "data", "data/set.npz", "/", ".", "w", "/dev/null", "precious/thesis.tex", "1" * 5000,
                     "2**64", str(2**64), "-0.0", "٣", "mean=ant|bee", "x" * 5000, "os:getcwd", "a:b:c", ":"]),
    st.integers(-3, 200).map(str),
    st.floats(-2, 2).map(str),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8),
)  # fmt: skip
OVERRIDES = st.dictionaries(FIELDS, VALUES, min_size=1, max_size=3)


@checked(250)
@given(OVERRIDES, STAGE_LISTS, st.lists(st.sampled_from(["--overwrite", "--seed=-1", "--seed=x"]), max_size=1))
def test_whatever_the_config_says(make_world, overrides, stage_list, flags):
    make_world().run(*stage_list, *flags, *(f"--config.{field}={value}" for field, value in overrides.items()))


PATHS = st.one_of(
    st.sampled_from([".", "..", "/", "data", "data/set.npz", "data/x", "w/../data", "w/train", "link", "link/w",
                     "loop/w", "tiny.py", "tiny.py/w", "precious", "precious/train", "~", "~nobody", "gs:/x",
                     "s3://a/b", "file:///x", "x" * 300, "a/" * 2500, "/dev/null", "/dev/null/x", "/proc/w", "w\n",
                     "\x1b[31mw", "-", "--", " "]),
    ANY_NAMES.map(lambda name: f"w/{name}"),
)  # fmt: skip


@checked(60)
@given(PATHS, STAGE_LISTS)
def test_whatever_the_workdir_is_called(make_world, path, stage_list):
    world = make_world()
    (world.root / "link").symlink_to("data")
    (world.root / "loop").symlink_to("loop")
    before = snapshot(world.root)
    result = headsteer("run", "--config=tiny.py", f"--workdir={path}", *stage_list, cwd=world.root)
    assert result.returncode in (0, 2), result.stderr
    assert result.stderr.count("error: ") == (result.returncode == 2)
    after = snapshot(world.root)
    if result.returncode == 2:
        assert after == before
    else:  # only directories on the way to the workdir were touched
        place = os.path.relpath(os.path.realpath(world.root / path), os.path.realpath(world.root))
        kept = {name: entry for name, entry in before.items() if name and entry[2] is not None}
        assert {name: after.get(name) for name in kept} == kept
        assert all(name in before or place == "." or name.startswith(place.partition("/")[0]) for name in after)


def images(numbers: int) -> bytes:
    return png(np.random.default_rng(numbers).integers(0, 256, (8, 8), np.uint8))


DATA_NAMES = st.one_of(
    st.sampled_from(["train", "test", "val", "validation", "valid", "Train", "images", "a.png", "b.jpg", "c.txt",
                     "._a.png", ".DS_Store", "ant", "bee", "cat", "a[1].png", "val_annotations.txt", "wnids.txt"]),
    ANY_NAMES, ANY_NAMES.map(lambda name: f"{name}.png"), st.just("y" * 251 + ".png"),
)  # fmt: skip
IMAGES = st.integers(0, 99).map(images)
CLASS_TREES = st.dictionaries(
    DATA_NAMES, st.one_of(IMAGES, IMAGES, CONTENTS, LINKS, st.just("FIFO")), min_size=3, max_size=5
)
SPLIT_TREES = st.dictionaries(DATA_NAMES, st.one_of(CLASS_TREES, CLASS_TREES, IMAGES, CONTENTS, LINKS), max_size=4)
DATA_TREES = st.one_of(
    st.fixed_dictionaries({"train": SPLIT_TREES}, optional={"test": SPLIT_TREES, "val": SPLIT_TREES}),
    st.dictionaries(DATA_NAMES, st.one_of(SPLIT_TREES, CLASS_TREES, CONTENTS), max_size=3),
)


@checked(120)
@given(DATA_TREES, st.sampled_from(["folder", "npz", "tfds"]), st.sampled_from(["data", "data/train", "./data/"]))
def test_whatever_the_data_are(make_world, tree, source, path):
    world = make_world()
    plant(world.root / "data", tree)
    name = ("--config.data.name=data",) if source == "tfds" else ()
    world.run(f"--config.data.source={source}", f"--config.data.path={path}", *name)


RECORD_FILES = st.sampled_from(
    ["config.json", *(f"{name}/done.json" for name, stage in STAGES.items() if stage.by_default), "train/started.json"]
)
RECORD_FIELDS = ("format", "config", "data", "file", "inputs", "finished", "products", "seconds", "peak_memory_bytes")
RECORD_CHANGES = st.one_of(
    CONTENTS, st.tuples(st.sampled_from(RECORD_FIELDS), JSON | st.just("DROP")), st.just(("format", 4))
)


@checked(80)
@given(RECORD_FILES, RECORD_CHANGES, st.sampled_from(["run", "overwrite", "page", "export", "load"]))
def test_whatever_a_finished_runs_records_say(make_world, file, change, command):
    """Records that are damaged or edited by hand are refused in a line, or made again."""
    world = make_world()
    assert world.run().returncode == 0
    path = world.workdir / file
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        record = json.loads(path.read_text())
        record[change[0]] = change[1]
        if change[1] == "DROP":
            record.pop(change[0])
        path.write_text(json.dumps(record))
    if command in ("run", "overwrite"):
        world.run(*(("--overwrite",) if command == "overwrite" else ()))
    else:
        arguments = {"page": ("w",), "export": ("w", "timm:w.safetensors"), "load": ("w", "--output=w/page")}[command]
        # the fakes' results cannot be read, so that every one of these commands is refused
        world.headsteer(*arguments, command="page" if command == "load" else command)


@pytest.mark.parametrize("name", ["train", "report"])
def test_old_results_are_not_read_beside_a_new_record(make_world, name):
    """A run that died before it put new results in place: what is there now belongs to the old record."""
    world = make_world()
    assert world.run().returncode == 0
    shutil.copytree(world.workdir / name, world.workdir / f".{name}.new")
    arguments = ("w", "timm:x.safetensors") if name == "train" else ("w",)
    result = world.headsteer(*arguments, command="export" if name == "train" else "page")
    assert f"w/{name}: its old results are not replaced by the new ones yet" in result.stderr
    assert world.run().returncode == 0  # puts them there
    assert not (world.workdir / f".{name}.new").exists()


@contextlib.contextmanager
def killed_after(steps: int | None) -> Iterator[None]:
    """Let the process die at one of its changes of the disk: after that, none succeeds."""
    left = [10**9 if steps is None else steps]

    def guard(call: Any) -> Any:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return call(*args, **kwargs)

        return guarded

    opens = builtins.open

    def guarded_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return (guard(opens) if set(mode) & set("wax+") else opens)(file, mode, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace", "rmdir", "unlink", "mkdir", "remove"):
            patch.setattr(os, name, guard(getattr(os, name)))
        patch.setattr(builtins, "open", guarded_open)
        yield


COMMANDS = st.fixed_dictionaries(
    {
        "data": st.sampled_from([0, 0, 0, 1]),
        "seed": st.sampled_from([0, 1]),
        "sae.k": st.sampled_from([4, 3]),
        "steer.latents": st.sampled_from([3, 2]),
        "report.dpi": st.sampled_from([60, 70]),
        "stages": st.sampled_from(["", "", "", "train", "train,sae", "steer,report", "layers", "grid,report", "sae"]),
        "overwrite": st.sampled_from([True, True, True, False]),
        "killed_after": st.one_of(st.none(), st.integers(0, 30), st.integers(20, 90)),
    }
)  # fmt: skip


@checked(50)
@given(st.booleans(), st.lists(COMMANDS, min_size=2, max_size=5))
def test_at_every_moment_the_old_or_the_new_results_are_complete(make_world, starts_whole, commands):
    """Random commands, configs, data and kills: what was complete stays so or is replaced, and it is what it says."""
    world = make_world()
    workdir = Workdir(stages.Path(world.workdir))
    complete: set[str] = set()
    kept: dict[str, str] = {}  # the user's files: some in directories of stages
    if starts_whole:
        assert world.run().returncode == 0
    for command in commands:
        world.write_data(command["data"])
        flags = [f"--config.{field}={command[field]}" for field in ("seed", "sae.k", "steer.latents", "report.dpi")]
        flags += [f"--stages={command['stages']}"] * bool(command["stages"]) + ["--overwrite"] * command["overwrite"]
        if command["killed_after"] is None:
            world.run(*flags)
        else:
            with contextlib.suppress(Killed), killed_after(command["killed_after"]):
                headsteer("run", "--config=tiny.py", "--workdir=w", *flags, cwd=world.root)
        for name in STAGES:
            if is_done(workdir, STAGES[name]):
                complete.add(name)
                check_results(workdir, name)
        assert complete <= {name for name in STAGES if is_done(workdir, STAGES[name])}
        for name, text in kept.items():
            places = [world.workdir / name, world.workdir / f".{name.replace('/', '.new/', 1)}"]
            assert text in [path.read_text() for path in places if path.exists()], name
        for name in ("train/mine.txt", "report/notes[1].txt", "report/notes1.txt", "layers/2024.txt", "figures/a.png"):
            if (world.workdir / name).parent.exists() and name not in kept:
                (world.workdir / name).write_text(kept.setdefault(name, f"the user's {name}"))
    world.write_data(0)
    assert world.run("--overwrite").returncode == 0
    for name in ("train", "sae", "steer", "layers", "report"):
        check_results(workdir, name)
        assert not locate_new(workdir, name).exists() or not (locate_new(workdir, name) / "done.json").exists()
        recorded = read_record(workdir, name)
        assert recorded is not None
        assert recorded["config"]["seed"] == 0
    assert not list(world.workdir.glob(".*.removed"))
    assert {name: (world.workdir / name).read_text() for name in kept} == kept


def check_results(workdir: Workdir, name: str) -> None:
    """Check that all files of a complete stage are of one making, which its record describes."""
    directory = Path(locate_complete(workdir, name))
    record = json.loads((directory / "done.json").read_text())
    text = (directory / "result").read_text()
    assert (directory / "checkpoints/4/x").read_text() == text
    written = json.loads(text)
    assert written[:2] == [name, record["config"]["seed"]]
    new = redirect_stage(workdir, name, STAGES[name].products)
    for product in record["products"]:
        moved = Path(workdir.path / product)  # a replacement that was interrupted may not have moved it yet
        place = Path(new / product) if directory.name.startswith(".") and Path(new / product).exists() else moved
        assert place.read_text() == text, product
