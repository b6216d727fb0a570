"""Tests that a run survives being killed, terminated, damaged checkpoints and a full disk, with the same numbers.

    python benchmarks/interruptions.py reference --workdir=DIR
    python benchmarks/interruptions.py kill      --workdir=DIR [--times=50] [--overwrite]
    python benchmarks/interruptions.py terminate --workdir=DIR [--times=20]
    python benchmarks/interruptions.py damage    --workdir=DIR [--times=100] [--direct]
    python benchmarks/interruptions.py full      --workdir=DIR [--times=3] [--stages=train,sae,...]

Each command drives `headsteer run` on a tiny config and compares the result with an uninterrupted run's, bit for bit:
every parameter and optimizer state, the autoencoders, the sweep and the summary. `reference` makes that run
twice, first to compile and then to be timed, and checks that both agree. The other commands make it if there is none.

`kill` and `terminate` interrupt a run again and again, at random moments or while a file is written, until it has
finished. With --overwrite the run replaces one of another seed; after each interruption every stage must be completely
old or completely new. `damage` changes a bit of a checkpoint or cuts a file of it short, and then runs the command or
(--direct) restores in this process. `full` (Linux, as root) runs a stage on a small disk, which it then enlarges.

DIR/trials.jsonl has a line for each trial. A trial that has its line is not repeated, so a new version of the program
needs a new DIR. A trial that fails keeps its directory in DIR/trials. The last line printed is one JSON object with the
figures. The exit code is 1 if a trial failed.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported, here and in the runs

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils.epath import Path as EPath

from headsteer_jax.analysis.sweep_file import read_sweep
from headsteer_jax.config.files import load_config
from headsteer_jax.data.sources import load_dataset
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.vit import build_model
from headsteer_jax.runtime.checkpoint import Checkpoints
from headsteer_jax.runtime.files import Workdir, read_arrays
from headsteer_jax.runtime.staging import replace_stage
from headsteer_jax.stages import STAGES as TABLE
from headsteer_jax.train.log import read_log
from headsteer_jax.train.loop import PHASES, init_params
from headsteer_jax.train.step import State, init_optimizer

ROOT = Path(__file__).parent.parent
STAGES = ("train", "sae", "grid", "steer", "layers", "report")
PRODUCTS = {  # what a stage writes outside its own directory
    "sae": ("activations",),
    "grid": ("activations",),
    "steer": ("sweep.nc",),
    "layers": ("activations",),
    "report": ("summary.json", "report.html", "latents.html", "explorer.html", "figures"),
}
DAMAGED = {"train": "train/dense_control/last", "sae": "sae/checkpoints"}  # a stage's checkpoints
RESUME = 75  # exit code of a run that saved what it had and asks for the same command again
PATIENCE = 60.0  # seconds that a terminated run may take to end
LONGEST = 900.0  # seconds that any run may take
STARTING = 10.0  # seconds within which SIGTERM may end Python itself, before the program could hear it
SHOWN = 12  # differences that are listed: one bit reaches every parameter within a step
# of orbax, of this package, of TensorStore
TEMPORARY = re.compile(r"\.orbax-checkpoint-tmp|^\.[^.].*\.(?!new$)\w+$|\.__lock$")
CONFIG = '''"""A run of about a minute that saves often."""

from headsteer_jax.config import (
    Config, DataConfig, GateConfig, GridConfig, LayersConfig, ModelConfig, PhaseConfig, ReportConfig, SAEConfig,
    SteerConfig, TrainConfig,
)


def get_config():
    return Config(
        data=DataConfig(name="double_digits", image_size=16, crop_padding=1, train_per_class=3, eval_per_class=2),
        model=ModelConfig(patch=4, depth=3, width=24, heads=3),
        gate=GateConfig(bias=0.0),
        train=TrainConfig(
            batch=16, dense=PhaseConfig(steps=24), gated=PhaseConfig(steps=24), steps_per_call=2, eval_every=4,
            eval_batch=50, dense_control=True,
        ),
        sae=SAEConfig(expansion=2, k=4, seeds=2, epochs=20, batch=64, dead_window=1),
        grid=GridConfig(k=(2, 4), learning_rates=(1e-3, 4e-3), seeds=1, epochs=20),
        steer=SteerConfig(latents=3, alphas=(-1.0, 0.0, 0.5, 2.0), bootstrap=50, least_validation=1),
        layers=LayersConfig(epochs=10, alphas=(2.0,), per_class=1),
        report=ReportConfig(top_classes=3, top_latents=2, top_images=3, dpi=60),
    )
'''

# ---- the results of a run


def steps_in(directory: Path) -> list[int]:
    """List the steps of the finished checkpoints in a directory, in order."""
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit()) if directory.exists() else []


def hash_value(value: Any) -> str:
    """Hash an array with its type and shape, or anything that is JSON."""
    if isinstance(value, (np.ndarray, jax.Array)):
        array = np.asarray(value)
        content = repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
        content += f"{array.dtype} {array.shape}".encode()
    else:
        content = json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path), leaf


def checkpoint_contents(directory: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the newest checkpoint's step, arrays and JSON object, read by orbax without this package."""
    steps = steps_in(directory)
    yield f"{name}: step", steps[-1:]
    if steps:
        path = directory / str(steps[-1])
        with ocp.StandardCheckpointer() as reader:
            tree = reader.restore(path / "state")
        for leaf, value in named_leaves(tree):
            yield f"{name}: {leaf}", value
        yield f"{name}: about", json.loads((path / "about" / "metadata").read_text())


def contents(workdir: Path, stages: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield every result of these stages that must not depend on interruptions, by name."""
    if "train" in stages:
        for phase in PHASES:
            for kind in ("last", "best"):
                yield from checkpoint_contents(workdir / "train" / phase / kind, f"train/{phase}/{kind}")
        rows: dict[str, list[Any]] = {}
        for row in read_log(workdir / "train" / "metrics.jsonl"):
            rows.setdefault(f"train/metrics.jsonl: {row['phase']} {row['step']}", []).append(row)
        yield from rows.items()
        yield "train/metrics.jsonl: order", list(rows)
        yield "train/test.json", json.loads((workdir / "train" / "test.json").read_text())
    if "sae" in stages:
        for file in ("autoencoders.npz", "inside.npz"):
            for name, array in read_arrays(workdir / "sae" / file).items():
                yield f"sae/{file}: {name}", array
        yield "sae/health.json", json.loads((workdir / "sae" / "health.json").read_text())
    for stage in ("grid", "layers"):
        if stage in stages:
            yield f"{stage}/{stage}.json", json.loads((workdir / stage / f"{stage}.json").read_text())
    if "steer" in stages:
        sweep = read_sweep(workdir / "sweep.nc")
        for variable in sweep.variables:
            yield f"sweep.nc: {variable}", sweep[variable].values
    if "report" in stages:
        for name, value in json.loads((workdir / "summary.json").read_text()).items():
            if name not in ("seconds", "peak_memory_bytes"):
                yield f"summary.json: {name}", value
        for name in (
            "report.html",
            "latents.html",
            "explorer.html",
        ):  # they hold times and paths: only check that they are complete
            yield name, (workdir / name).read_text().rstrip().endswith("</html>")


def digest(workdir: Path, stages: Iterable[str] = STAGES) -> dict[str, str]:
    """Hash everything that must be the same, by name, so that a difference names its culprit."""
    return {name: hash_value(value) for name, value in contents(workdir, tuple(stages))}


def difference(workdir: Path, reference: dict[str, str], stages: Iterable[str] = STAGES) -> list[str]:
    """Describe what differs from the reference in these stages, one line for each difference."""
    stages = tuple(stages)
    prefixes = [f"{stage}/" for stage in stages]
    prefixes += ["sweep.nc"] if "steer" in stages else []
    prefixes += ["summary.json", "report.html", "latents.html", "explorer.html"] if "report" in stages else []
    expected = {name: value for name, value in reference.items() if name.startswith(tuple(prefixes))}
    try:
        actual = digest(workdir, stages)
    except Exception as error:  # whatever is missing or unreadable is the finding
        return [f"unreadable: {type(error).__name__}: {' '.join(str(error).split())[:200]}"]
    lines = [f"differs: {name}" for name in sorted(expected.keys() | actual.keys())
             if expected.get(name) != actual.get(name)]  # fmt: skip
    return lines[:SHOWN] + [f"and {len(lines) - SHOWN} more differ"] * (len(lines) > SHOWN)


def temporaries(workdir: Path) -> set[str]:
    """Find half-written files and directories anywhere in a workdir."""
    return {str(path.relative_to(workdir)) for path in workdir.rglob("*") if TEMPORARY.search(path.name)}


def mixed_stages(workdir: Path, old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Name the stages that are neither completely old nor completely new, as the next start will find them."""
    copy = workdir.with_name("as-found")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(workdir, copy)
    for stage in TABLE.values():
        replace_stage(Workdir(EPath(copy)), stage.name, stage.entries, stage.products)
    mixed = []
    for name in STAGES:
        ways = [difference(copy, reference, [name]) for reference in (old, new)]
        if all(ways) or not (copy / name / "done.json").exists():
            mixed.append(f"{name} is neither the old one ({ways[0][:1]}) nor the new one ({ways[1][:1]})")
    shutil.rmtree(copy)
    return mixed


def stage_of(workdir: Path) -> str:
    """Name the stage that was started and is not done; else `between`."""
    if beside := [stage for stage in STAGES if (workdir / f".{stage}.new" / "started.json").exists()]:
        return f"{beside[-1]}, beside the old one"
    started = [stage for stage in STAGES if (workdir / stage / "started.json").exists()]
    if not started:
        return "before the first"
    return "between" if (workdir / started[-1] / "done.json").exists() else started[-1]


# ---- running


class Campaign:
    """A directory with the config, the reference run, the programs compiled so far and the log of trials."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory, self.seed = directory.resolve(), seed
        self.directory.mkdir(parents=True, exist_ok=True)
        self.config = self.directory / "tiny.py"
        self.config.write_text(CONFIG)
        self.log = self.directory / "trials.jsonl"
        self.rows = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        self.reference: dict[str, str] = {}
        self.old: dict[str, str] = {}  # of the run that is overwritten
        self.seconds = 0.0

    def trials(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["what"] == kind]

    def add(self, **row: Any) -> None:
        """Log a trial and print it."""
        self.rows.append(row)
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def make_reference(self) -> None:
        """Read the reference, or make it: once to compile, once to be timed.

        Raises:
          SystemExit: a run failed, or two runs differ.
        """
        file, workdir = self.directory / "reference.json", self.directory / "reference"
        if not file.exists():
            digests = []
            for _ in range(2):
                shutil.rmtree(workdir, ignore_errors=True)
                begin = time.monotonic()
                with Run(self, workdir) as run:
                    code = run.wait(LONGEST)
                seconds = time.monotonic() - begin
                if code != 0 or run.untidy():
                    raise SystemExit(f"the reference failed: exit code {code}; see {run.stderr_file}")
                digests.append(digest(workdir))
            if digests[0] != digests[1]:
                raise SystemExit(f"two uninterrupted runs differ: {difference(workdir, digests[0])[:9]}")
            file.write_text(json.dumps({"seconds": seconds, "digest": digests[1]}, indent=1))
        read = json.loads(file.read_text())
        self.reference, self.seconds = read["digest"], read["seconds"]

    def make_old_run(self) -> None:
        """Make the run that is overwritten: it has another seed.

        Raises:
          SystemExit: the run failed.
        """
        file, workdir = self.directory / "old.json", self.directory / "old"
        if not file.exists():
            shutil.rmtree(workdir, ignore_errors=True)
            with Run(self, workdir, flags=("--seed=1",)) as run:
                code = run.wait(LONGEST)
            if code != 0:
                raise SystemExit(f"the run that is to be overwritten failed: exit code {code}; see {run.stderr_file}")
            file.write_text(json.dumps(digest(workdir), indent=1))
        self.old = json.loads(file.read_text())

    @contextlib.contextmanager
    def trial(self, kind: str, number: int) -> Iterator[tuple[Path, np.random.Generator, list[str]]]:
        """Give a trial a directory, random numbers and a list of failures; the directory stays only after a failure."""
        directory = self.directory / "trials" / f"{kind.replace(' ', '-')}-{number}"
        shutil.rmtree(directory, ignore_errors=True)  # a trial that was itself interrupted may have left it
        directory.mkdir(parents=True)
        failures: list[str] = []
        rng = np.random.default_rng([self.seed, *kind.encode(), number])
        yield directory, rng, failures
        if failures:
            failures.append(f"kept in {directory}")
        else:
            shutil.rmtree(directory)


class Run:
    """A run in a process group of its own, which ends with the `with` statement."""

    def __init__(
        self, campaign: Campaign, workdir: Path, stages: Iterable[str] = STAGES, flags: Iterable[str] = ()
    ) -> None:
        number = len(list(workdir.parent.glob(f"{workdir.name}.*.stderr")))
        self.workdir, self.stderr_file = workdir, workdir.parent / f"{workdir.name}.{number}.stderr"
        self._command = [sys.executable, str(ROOT / "run.py"), f"--config={campaign.config}", f"--workdir={workdir}"]
        self._command += [f"--stages={','.join(stages)}", *flags]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        compiled = {"JAX_COMPILATION_CACHE_DIR": str(campaign.directory / "compiled")}
        compiled["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        self._environment = os.environ | compiled | {"PYTHONPATH": path}

    def __enter__(self) -> "Run":
        with self.stderr_file.open("wb") as stderr:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=stderr, cwd=self.workdir.parent, start_new_session=True,
            )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Send SIGKILL to the run and to every process that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def code(self) -> int | None:
        return self.process.poll()

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text(errors="replace")

    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]

    def untidy(self) -> list[str]:
        """List what no user should see."""
        words = [word for word in ("Traceback", "Exception ignored", "Fatal Python error") if word in self.stderr]
        return [f"{word} in {self.stderr_file.name}" for word in words]

    def wait(self, seconds: float) -> int | None:
        """Wait for the run's end: its exit code, or None if it still runs after so many seconds."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until a condition holds, which is checked all the time; False if the run or the time ended first."""
        end = time.monotonic() + seconds
        while self.code is None and time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.003)  # a checkpoint of this size takes 50 ms
        return False

    def wait_for_writes(self, count: int, seconds: float) -> bool:
        """Wait until so many files or checkpoints were begun to be written; False if the run or time ended first."""
        directories = watched(self.workdir)
        names = _temporaries_now(directories)  # an earlier run that was killed left them
        count += len(names)

        def begun() -> bool:
            names.update(_temporaries_now(directories))
            return len(names) >= count

        return self.wait_until(begun, seconds)

    def finish(self) -> list[str]:
        """Let the run go to its end, and list what was wrong."""
        code = self.wait(LONGEST)
        if code is None:
            return [f"not done after {LONGEST:.0f} s: {self.stderr_file.name}"]
        return ([f"exit code {code}: {self.stderr_file.name}: {self._last_line()}"] if code else []) + self.untidy()

    def _last_line(self) -> str:
        return (self.stderr.strip().splitlines() or ["no output"])[-1][:200]


def watched(workdir: Path) -> list[Path]:
    """List the directories that files and checkpoints are written to; few, as they are read all the time."""
    checkpoints = [f"train/{phase}/{kind}" for phase in PHASES for kind in ("last", "best")]
    checkpoints += ["sae/checkpoints", "grid/checkpoints", "layers/1/checkpoints", "layers/2/checkpoints"]
    parts = [name.partition("/") for name in (*STAGES, *checkpoints)]
    beside = [workdir / f".{stage}.new{slash}{path}" for stage, slash, path in parts]
    return [workdir, *(workdir / f"{stage}{slash}{path}" for stage, slash, path in parts), *beside]


def _temporaries_now(directories: list[Path]) -> set[str]:
    names = set()
    for directory in directories:
        with contextlib.suppress(OSError):  # not there yet, or just renamed
            names |= {entry.path for entry in os.scandir(directory) if TEMPORARY.search(entry.name)}
    return names


# ---- killed and terminated


def kill(run: Run, delay: float, failures: list[str]) -> str | None:
    """Send SIGKILL; returns what came of it, or None if the run had just finished."""
    run.kill()
    return "killed" if run.code == -signal.SIGKILL else None


def terminate(run: Run, delay: float, failures: list[str]) -> str | None:
    """Send SIGTERM: the run must end by itself, ask to be resumed, and say so in one line."""
    printed, begin = len(run.stderr.splitlines()), time.monotonic()
    with contextlib.suppress(ProcessLookupError):
        run.process.send_signal(signal.SIGTERM)
    code = run.wait(PATIENCE)
    if code == 0:
        return None  # it had just finished
    if code == -signal.SIGTERM and not run.stderr and delay < STARTING:
        return "before it could hear"
    place = f"{run.stderr_file.name}, {stage_of(run.workdir)}"
    if code is None:
        failures.append(f"still there {PATIENCE:.0f} s after SIGTERM: {place}")
        return "ignored"
    if code != RESUME:
        failures.append(f"exit code {code} after SIGTERM: {place}")
    lines = [line for line in run.stderr.splitlines()[printed:] if "same command" in line]
    if len(lines) != 1:
        failures.append(f"{len(lines)} lines say how to go on: {place}")
    return f"ended after {'more than 5' if time.monotonic() - begin > 5 else 'at most 5'} s"


def chain(campaign: Campaign, kind: str, number: int, most: int, overwrite: bool) -> None:
    """Interrupt one run up to `most` times and resume it each time; the last time it may finish.

    Args:
      overwrite: it replaces an old run.
    """
    flags = ("--overwrite",) if overwrite else ()
    interrupt = {"kill": kill, "terminate": terminate}[kind.partition(" ")[0]]
    begin, interruptions = time.monotonic(), []
    with campaign.trial(kind, number) as (directory, rng, failures):
        workdir = directory / "run"
        if overwrite:
            shutil.copytree(campaign.directory / "old", workdir)
        for link in range(most):
            aim = bool(rng.random() < 0.5)
            # the first falls anywhere; those after it come sooner, so that many interruptions cost few whole runs
            delay = rng.uniform(0, campaign.seconds * (1.0 if link == 0 else 0.4))
            writes, into = int(rng.integers(1, 13)), rng.uniform(0, 0.06)
            left_over = temporaries(workdir)
            with Run(campaign, workdir, flags=flags) as run:
                started = time.monotonic()
                if aim and run.wait_for_writes(writes, LONGEST):
                    time.sleep(into)
                elif not aim:
                    run.wait(delay)
                came = None if run.code is not None else interrupt(run, time.monotonic() - started, failures)
                if came is None:
                    failures += run.finish()
                    break
            failures += run.untidy()
            if overwrite:
                failures += mixed_stages(workdir, campaign.old, campaign.reference)
            interruptions.append(
                {
                    "stage": stage_of(workdir),
                    "after": round(time.monotonic() - started, 2),
                    "aimed": aim,
                    "in_write": sorted(temporaries(workdir) - left_over),
                    "came": came,
                }
            )
            if failures:
                break
        else:
            with Run(campaign, workdir, flags=flags) as run:
                failures += run.finish()
        if not failures:
            failures += difference(workdir, campaign.reference)
        litter = sorted(temporaries(workdir) | {path.name for path in workdir.glob(".*.new")})
    campaign.add(
        what=kind, number=number, interruptions=interruptions, failures=failures, litter=litter,
        seconds=round(time.monotonic() - begin, 1),
    )  # fmt: skip


def interrupted(campaign: Campaign, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run chains until there were as many interruptions as asked for."""
    if args.overwrite:
        campaign.make_old_run()

    def all_interruptions() -> list[dict[str, Any]]:
        interruptions = [interruption for row in campaign.trials(kind) for interruption in row["interruptions"]]
        return [interruption for interruption in interruptions if interruption["came"] != "before it could hear"]

    while len(all_interruptions()) < args.times and (args.chains is None or len(campaign.trials(kind)) < args.chains):
        missing = args.times - len(all_interruptions())
        chain(campaign, kind, len(campaign.trials(kind)), min(args.most, missing), args.overwrite)
    interruptions, rows = all_interruptions(), campaign.trials(kind)
    return {
        "interruptions": len(interruptions),
        "whole_runs": len(rows),
        "by_stage": Counter(interruption["stage"] for interruption in interruptions),
        "in_a_checkpoint": sum(any("orbax" in name for name in row["in_write"]) for row in interruptions),
        "in_another_file": sum(any("orbax" not in name for name in row["in_write"]) for row in interruptions),
        "came": Counter(interruption["came"] for interruption in interruptions),
        "left_over": sum(bool(row["litter"]) for row in rows),
    }


# ---- damaged


def halfway(campaign: Campaign, stage: str) -> Path:
    """Make, once, a workdir whose stage was killed when it had two checkpoints."""
    directory = campaign.directory / "halfway" / stage
    workdir, marker = directory / "run", directory / "made"
    checkpoints = workdir / DAMAGED[stage]
    while not marker.exists():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        unfinished(campaign.directory / "reference", workdir, stage)
        shutil.rmtree(checkpoints.parent if stage == "train" else workdir / stage, ignore_errors=True)
        with Run(campaign, workdir, [stage]) as run:
            reached = run.wait_until(lambda: len(steps_in(checkpoints)) >= 2, LONGEST)
        if not reached:
            raise SystemExit(f"{stage} could not be stopped halfway: {run.stderr}")
        if len(steps_in(checkpoints)) == 2 and not (workdir / stage / "done.json").exists():
            marker.write_text(f"{steps_in(checkpoints)}\n")
    return workdir


def unfinished(reference: Path, workdir: Path, stage: str) -> None:
    """Copy a finished workdir without the results of this stage and later ones; the phases of train stay."""
    shutil.copytree(reference, workdir)
    for name in STAGES[STAGES.index(stage) :]:
        for product in (name, *PRODUCTS.get(name, ())):
            path = workdir / product
            if path.is_dir() and name != "train":
                shutil.rmtree(path)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
    if stage == "train":
        for name in ("done.json", "test.json"):
            (workdir / "train" / name).unlink()


def damage_a_file(checkpoint: Path, rng: np.random.Generator) -> str:
    """Flip a bit of one file or cut it short, half the time a large one; returns a description of the damage."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size for path in files], float)
    path = files[rng.choice(len(files), p=sizes / sizes.sum() if rng.random() < 0.5 else None)]
    content, name = bytearray(path.read_bytes()), str(path.relative_to(checkpoint))
    if not content:
        path.unlink()
        return f"{name}: removed, as it is empty"
    place = int(rng.integers(len(content)))
    if rng.random() < 0.5:
        path.write_bytes(content[:place])
        return f"{name}: cut from {len(content)} to {place} bytes"
    bit = int(rng.integers(8))
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"{name}: bit {bit} of byte {place} of {len(content)}"


def damaged_run(campaign: Campaign, number: int) -> None:
    """Damage the newest checkpoint, then run: it must be refused in one line, or give the reference's numbers."""
    begin, stage = time.monotonic(), "sae" if number % 4 == 3 else "train"
    source = halfway(campaign, stage)
    with campaign.trial("damage", number) as (directory, rng, failures):
        workdir = directory / "run"
        shutil.copytree(source, workdir)
        earlier, newest = steps_in(workdir / DAMAGED[stage])
        description = damage_a_file(workdir / DAMAGED[stage] / str(newest), rng)
        with Run(campaign, workdir, [stage]) as run:
            code = run.wait(LONGEST)
        failures += run.untidy()
        came = f"exit code {code}"
        if code == 2:
            errors = run.errors()
            came = "refused"
            if len(errors) != 1 or str(workdir / DAMAGED[stage]) not in errors[0]:
                failures.append(f"refused without one line that names the checkpoint: {errors}")
        elif code == 0:
            resumed = re.findall(r"resuming from (?:step|epoch) (\d+)", run.stderr)
            names = {str(newest): "went on from it", str(earlier): "went on from the one before"}
            came = names.get(resumed[-1] if resumed else "", "began anew")
            failures += difference(workdir, campaign.reference, [stage])
        else:
            failures.append(came)
    campaign.add(
        what="damage", number=number, stage=stage, damage=description, came=came, failures=failures,
        seconds=round(time.monotonic() - begin, 1),
    )  # fmt: skip


def empty_state(campaign: Campaign) -> State:
    """Make a state with the shapes of a dense phase."""
    config = load_config(str(campaign.config), {})
    dataset = load_dataset(config.data, config.seed, config.machine.image_memory)
    params = init_params(build_model(config, len(dataset.class_names)), config, config.seed)
    average = params if config.train.ema else None
    key = jax.random.key_data(jax.random.key(0))
    return State(params, average, init_optimizer(config, params), key, jnp.int32(0))


def damaged_directly(campaign: Campaign, numbers: Iterable[int]) -> None:
    """Damage the newest checkpoint, then restore: HeadSteerError, or what was saved at the step that it names."""
    source = halfway(campaign, "train") / DAMAGED["train"]
    like, truth = empty_state(campaign), {}
    for step in steps_in(source):
        tree, about = Checkpoints(source, 2).restore(like, step)
        truth[step] = {name: hash_value(leaf) for name, leaf in named_leaves(tree)}, hash_value(about)
    earlier, newest = sorted(truth)
    for number in numbers:
        begin = time.monotonic()
        with campaign.trial("damage directly", number) as (directory, rng, failures):
            shutil.copytree(source, directory / "last")
            description = damage_a_file(directory / "last" / str(newest), rng)
            try:
                checkpoints = Checkpoints(directory / "last", 2)
                tree, about = checkpoints.restore(like)
                checkpoints.close()
            except HeadSteerError as error:
                came = "refused"
                if str(directory / "last") not in str(error):
                    failures.append(f"names no path: {error}")
            except Exception as error:
                came = f"{type(error).__name__}"
                failures.append(f"{came}: {' '.join(str(error).split())[:200]}")
            else:
                step = int(about.get("step", -1))
                came = {newest: "restored", earlier: "restored the one before"}.get(step, f"restored step {step}")
                leaves, true_about = truth.get(step, ({}, ""))
                failures += [
                    f"differs: {name}" for name, leaf in named_leaves(tree) if hash_value(leaf) != leaves.get(name)
                ]
                failures += ["differs: about"] if hash_value(about) != true_about else []
        campaign.add(
            what="damage directly", number=number, damage=description, came=came, failures=failures,
            seconds=round(time.monotonic() - begin, 2),
        )  # fmt: skip


def damage(campaign: Campaign, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Damage checkpoints, as often as asked for."""
    numbers = range(len(campaign.trials(kind)), args.times)
    if kind == "damage directly":
        damaged_directly(campaign, numbers)
    else:
        for number in numbers:
            damaged_run(campaign, number)
    rows = campaign.trials(kind)
    return {"came": Counter(row["came"] for row in rows)}


# ---- a full disk


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[Callable[[int], None]]:
    """Mount a file system of so many bytes in memory; yields a function that changes its size."""
    place.mkdir(parents=True, exist_ok=True)

    def mount(options: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"full needs to mount a tmpfs, which is refused: {done.stderr.strip()}")

    mount(f"size={size}")
    try:
        yield lambda size: mount(f"remount,size={size}")
    finally:
        for _ in range(20):  # a killed run's files are closed in a moment
            if subprocess.run(["umount", str(place)], capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.25)
        else:
            subprocess.run(["umount", "-l", str(place)], check=False)


def occupied(directory: Path) -> int:
    """Count the bytes of a directory on a tmpfs, which stores whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in directory.rglob("*") if path.is_file())


def fill_disk(campaign: Campaign, stage: str, number: int) -> None:
    """Run a stage on a disk that is too small: one line; with more room the same command must finish."""
    begin, reference = time.monotonic(), campaign.directory / "reference"
    stages = STAGES[: STAGES.index(stage) + 1]
    with campaign.trial(f"full {stage}", number) as (directory, rng, failures):
        before, workdir = (
            directory / "before",
            directory / "disk",
        )  # only the workdir is on the small disk, not what is printed
        unfinished(reference, before, stage)
        if stage == "train":
            shutil.rmtree(before)
            before.mkdir()
        there = occupied(before)
        adds = sum(occupied(path) for path in (reference / name for name in (stage, *PRODUCTS.get(stage, ()))))
        adds += sum(path.stat().st_size for path in map(reference.joinpath, PRODUCTS.get(stage, ())) if path.is_file())
        margin = int(rng.uniform(0, 0.9) * adds)
        with small_disk(workdir, there + margin) as resize:
            shutil.copytree(before, workdir, dirs_exist_ok=True)
            with Run(campaign, workdir, stages) as run:
                code = run.wait(LONGEST)
            failures += run.untidy()
            came, errors = f"exit code {code}", run.errors()
            if code == 2:
                came = "one line"
                if len(errors) != 1 or "disk is full" not in errors[0]:
                    failures.append(f"no one line that says that the disk is full: {errors}")
            elif code == 0:
                came = "fitted"
            else:
                failures.append(f"{came}: {' '.join(run.stderr.split())[-200:]}")
            resize(there + 20 * adds + 2**26)
            with Run(campaign, workdir, stages) as run:
                failures += run.finish()
            failures += difference(workdir, campaign.reference, stages)
            if failures:
                shutil.copytree(workdir, directory / "run")
        shutil.rmtree(before)
    campaign.add(
        what="full", stage=stage, number=number, there=there, margin=margin, adds=adds, came=came, failures=failures,
        seconds=round(time.monotonic() - begin, 1),
    )  # fmt: skip


def full(campaign: Campaign, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Fill the disk in every stage, as often as asked for."""
    for number in range(args.times):
        for stage in args.stages:
            if not any(row["stage"] == stage and row["number"] == number for row in campaign.trials(kind)):
                fill_disk(campaign, stage, number)
    rows = campaign.trials(kind)
    return {"came": {stage: Counter(row["came"] for row in rows if row["stage"] == stage) for stage in args.stages}}


# ---- the command line

BENCHMARKS: dict[str, tuple[Callable[..., dict[str, Any]], int, str]] = {
    "kill": (interrupted, 50, "SIGKILL at random moments"),
    "terminate": (interrupted, 20, "SIGTERM at random moments"),
    "damage": (damage, 100, "changed and truncated checkpoints"),
    "full": (full, 3, "a disk that fills up in each stage"),
}


def stage_names(text: str) -> list[str]:
    """Parse a list of stages; raises ArgumentTypeError if there is no such stage."""
    names = text.split(",")
    if unknown := set(names) - set(STAGES):
        raise argparse.ArgumentTypeError(f"there is no stage {min(unknown)!r}; choose from {', '.join(STAGES)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, help_text in {"reference": "an uninterrupted run"}.items() | {
        name: text for name, (_, _, text) in BENCHMARKS.items()
    }.items():
        command = commands.add_parser(name, help=help_text)
        command.add_argument("--workdir", type=Path, required=True)
        command.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: %(default)s)")
        if name in BENCHMARKS:
            command.add_argument(
                "--times", type=int, default=BENCHMARKS[name][1], help="how often (default: %(default)s)"
            )
        if name in ("kill", "terminate"):
            command.add_argument("--most", type=int, default=8, help="interruptions of one run (default: %(default)s)")
            command.add_argument("--chains", type=int, help="at most so many runs, however few the interruptions")
            command.add_argument("--overwrite", action="store_true", help="the run replaces one of another seed")
        if name == "damage":
            command.add_argument("--direct", action="store_true", help="restore in this process instead of running")
        if name == "full":
            command.add_argument("--stages", type=stage_names, default=list(STAGES))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every run is ended and every disk unmounted
    campaign = Campaign(args.workdir, args.seed)
    campaign.make_reference()
    if args.benchmark == "reference":
        figures: dict[str, Any] = {"digests": len(campaign.reference)}
        failed = []
    else:
        kind = "damage directly" if args.benchmark == "damage" and args.direct else args.benchmark
        if args.benchmark in ("kill", "terminate") and args.overwrite:
            kind += " with overwrite"
        figures = BENCHMARKS[args.benchmark][0](campaign, kind, args)
        rows = campaign.trials(kind)
        failed = [row for row in rows if row["failures"]]
        figures |= {"trials": len(rows), "failed": len(failed)}
        figures["seconds_per_trial"] = round(float(np.mean([row["seconds"] for row in rows])), 2) if rows else None
    print(json.dumps({"benchmark": args.benchmark, "reference_seconds": round(campaign.seconds, 1), **figures}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
