"""What a run survives: killed, terminated, its checkpoints damaged, its disk full - and still the same numbers.

    python benchmarks/interruptions.py reference --workdir=DIR
    python benchmarks/interruptions.py kill      --workdir=DIR [--times=50]
    python benchmarks/interruptions.py terminate --workdir=DIR [--times=20]
    python benchmarks/interruptions.py damage    --workdir=DIR [--times=100] [--direct]
    python benchmarks/interruptions.py full      --workdir=DIR [--times=3] [--stages=train,sae,...]

Each drives run.py on a tiny config and compares what it leaves with an uninterrupted run's: every parameter and
optimizer state, the autoencoders, the sweep, the summary, bit for bit. `reference` makes that run, twice: first to
compile, then to be timed; unless both agree there is nothing to compare with. The others make it where it is missing.

`kill` and `terminate` interrupt a run again and again, at random moments or as a file is being written, until it has
finished; `damage` changes a bit of a checkpoint or cuts a file of it short, through run.py or, with --direct, by
restoring in this process; `full` (Linux, as root) runs a stage on a small disk and then enlarges it.

DIR/trials.jsonl has a line for each trial: what is there is not tried again, so that a new version of the program
needs a new DIR. A trial that fails keeps its directory in DIR/trials. The last line printed is one JSON object with
the figures; the exit code is 1 where a trial failed.
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
import numpy as np
import orbax.checkpoint as ocp

from headsteer_jax.analysis.sweep_file import read_sweep
from headsteer_jax.config.files import load_config
from headsteer_jax.data.sources import load_dataset
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.vit import build_model
from headsteer_jax.runtime.checkpoint import Checkpoints
from headsteer_jax.runtime.files import read_arrays
from headsteer_jax.train.log import read_log
from headsteer_jax.train.loop import PHASES, init_params
from headsteer_jax.train.step import State, make_optimizer

ROOT = Path(__file__).parent.parent
STAGES = ("train", "sae", "grid", "steer", "layers", "report")
PRODUCTS = {  # of a stage, beside its own directory
    "sae": ("activations",),
    "grid": ("activations",),
    "steer": ("sweep.nc",),
    "layers": ("activations",),
    "report": ("summary.json", "report.html", "latents.html", "figures"),
}
DAMAGED = {"train": "train/dense_control/last", "sae": "sae/checkpoints"}  # by stage
RESUME = 75  # exit code of a run that saved what it had and asks for the same command again
PATIENCE = 60.0  # seconds that a terminated run may take to end
LONGEST = 900.0  # seconds that any run may take
STARTING = 10.0  # seconds within which SIGTERM may end Python itself, before the program could hear it
SHOWN = 12  # of what differs: one bit reaches every parameter within a step
TEMPORARY = re.compile(r"\.orbax-checkpoint-tmp|^\.[^.].*\.\w+$|\.__lock$")  # orbax's, ours, TensorStore's
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

# ---- what a run left


def steps_in(directory: Path) -> list[int]:
    """The steps of the finished checkpoints in a directory, in order."""
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit()) if directory.exists() else []


def mark(value: Any) -> str:
    """A short hash of an array with its type and shape, or of anything that is JSON."""
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


def of_checkpoint(directory: Path, name: str) -> Iterator[tuple[str, Any]]:
    """The newest checkpoint's step, arrays and JSON object, read by orbax without this package."""
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
    """Everything of these stages that must not depend on interruptions, by name."""
    if "train" in stages:
        for phase in PHASES:
            for kind in ("last", "best"):
                yield from of_checkpoint(workdir / "train" / phase / kind, f"train/{phase}/{kind}")
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
        for name in sweep.variables:
            yield f"sweep.nc: {name}", sweep[name].values
    if "report" in stages:
        for name, value in json.loads((workdir / "summary.json").read_text()).items():
            if name not in ("seconds", "peak_memory_bytes"):
                yield f"summary.json: {name}", value
        for name in ("report.html", "latents.html"):  # which tell of time and place: only that they are whole
            yield name, (workdir / name).read_text().rstrip().endswith("</html>")


def digest(workdir: Path, stages: Iterable[str] = STAGES) -> dict[str, str]:
    """Name -> hash of everything that must be the same, so that a difference names its culprit."""
    return {name: mark(value) for name, value in contents(workdir, tuple(stages))}


def difference(workdir: Path, reference: dict[str, str], stages: Iterable[str] = STAGES) -> list[str]:
    """What differs from the reference in these stages; each thing a line."""
    stages = tuple(stages)
    prefixes = [f"{stage}/" for stage in stages]
    prefixes += ["sweep.nc"] if "steer" in stages else []
    prefixes += ["summary.json", "report.html", "latents.html"] if "report" in stages else []
    want = {name: value for name, value in reference.items() if name.startswith(tuple(prefixes))}
    try:
        have = digest(workdir, stages)
    except Exception as error:  # whatever is missing or unreadable is the finding
        return [f"unreadable: {type(error).__name__}: {' '.join(str(error).split())[:200]}"]
    lines = [f"differs: {name}" for name in sorted(want.keys() | have.keys()) if want.get(name) != have.get(name)]
    return lines[:SHOWN] + [f"and {len(lines) - SHOWN} more differ"] * (len(lines) > SHOWN)


def temporaries(workdir: Path) -> set[str]:
    """Half-written files and directories, wherever they are."""
    return {str(path.relative_to(workdir)) for path in workdir.rglob("*") if TEMPORARY.search(path.name)}


def stage_of(workdir: Path) -> str:
    """The stage that was started and is not done; else `between`."""
    started = [stage for stage in STAGES if (workdir / stage / "started.json").exists()]
    if not started:
        return "before the first"
    return "between" if (workdir / started[-1] / "done.json").exists() else started[-1]


# ---- running


class Campaign:
    """A directory: the config, the reference, the programs compiled so far, the log of trials."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory, self.seed = directory.resolve(), seed
        self.directory.mkdir(parents=True, exist_ok=True)
        self.config = self.directory / "tiny.py"
        self.config.write_text(CONFIG)
        self.log = self.directory / "trials.jsonl"
        self.rows = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        self.reference: dict[str, str] = {}
        self.seconds = 0.0

    def of(self, what: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["what"] == what]

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
            found = []
            for _ in range(2):
                shutil.rmtree(workdir, ignore_errors=True)
                begin = time.monotonic()
                with Run(self, workdir) as run:
                    code = run.wait(LONGEST)
                seconds = time.monotonic() - begin
                if code != 0 or run.untidy():
                    raise SystemExit(f"the reference failed: exit code {code}; see {run.stderr_file}")
                found.append(digest(workdir))
            if found[0] != found[1]:
                raise SystemExit(f"two uninterrupted runs differ: {difference(workdir, found[0])[:9]}")
            file.write_text(json.dumps({"seconds": seconds, "digest": found[1]}, indent=1))
        read = json.loads(file.read_text())
        self.reference, self.seconds = read["digest"], read["seconds"]

    @contextlib.contextmanager
    def trial(self, what: str, number: int) -> Iterator[tuple[Path, np.random.Generator, list[str]]]:
        """A directory, random numbers of its own and a list for what goes wrong; kept only if something does."""
        directory = self.directory / "trials" / f"{what.replace(' ', '-')}-{number}"
        shutil.rmtree(directory, ignore_errors=True)  # of a trial that was itself interrupted
        directory.mkdir(parents=True)
        failures: list[str] = []
        rng = np.random.default_rng([self.seed, *what.encode(), number])
        yield directory, rng, failures
        if failures:
            failures.append(f"kept in {directory}")
        else:
            shutil.rmtree(directory)


class Run:
    """run.py in a process group of its own, which is gone when the `with` ends."""

    def __init__(self, campaign: Campaign, workdir: Path, stages: Iterable[str] = STAGES) -> None:
        number = len(list(workdir.parent.glob(f"{workdir.name}.*.stderr")))
        self.workdir, self.stderr_file = workdir, workdir.parent / f"{workdir.name}.{number}.stderr"
        self._command = [sys.executable, str(ROOT / "run.py"), f"--config={campaign.config}", f"--workdir={workdir}"]
        self._command.append(f"--stages={','.join(stages)}")
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
        """SIGKILL, to it and to whatever it started."""
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
        """What no user should see."""
        found = [word for word in ("Traceback", "Exception ignored", "Fatal Python error") if word in self.stderr]
        return [f"{word} in {self.stderr_file.name}" for word in found]

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None where it still runs."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether it came true while the program ran; looked at every few milliseconds."""
        end = time.monotonic() + seconds
        while self.code is None and time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.003)  # a checkpoint of this size takes 50 ms
        return False

    def wait_for_writes(self, count: int, seconds: float) -> bool:
        """Whether so many files or checkpoints were begun to be written; returns as the last of them is."""
        directories = watched(self.workdir)
        seen = _temporaries_now(directories)  # of an earlier run that was killed
        count += len(seen)

        def begun() -> bool:
            seen.update(_temporaries_now(directories))
            return len(seen) >= count

        return self.wait_until(begun, seconds)

    def finish(self) -> list[str]:
        """Let it run to its end; what was wrong."""
        code = self.wait(LONGEST)
        if code is None:
            return [f"not done after {LONGEST:.0f} s: {self.stderr_file.name}"]
        return ([f"exit code {code}: {self.stderr_file.name}: {self._last_line()}"] if code else []) + self.untidy()

    def _last_line(self) -> str:
        return (self.stderr.strip().splitlines() or ["nothing said"])[-1][:200]


def watched(workdir: Path) -> list[Path]:
    """The directories that files and checkpoints are written to; few, as they are looked at all the time."""
    checkpoints = [f"train/{phase}/{kind}" for phase in PHASES for kind in ("last", "best")]
    checkpoints += ["sae/checkpoints", "grid/checkpoints", "layers/1/checkpoints", "layers/2/checkpoints"]
    return [workdir, *(workdir / name for name in (*STAGES, *checkpoints))]


def _temporaries_now(directories: list[Path]) -> set[str]:
    found = set()
    for directory in directories:
        with contextlib.suppress(OSError):  # not there yet, or just renamed
            found |= {entry.path for entry in os.scandir(directory) if TEMPORARY.search(entry.name)}
    return found


# ---- killed and terminated


def kill(run: Run, delay: float, failures: list[str]) -> str | None:
    """SIGKILL; what came of it."""
    run.kill()
    return "killed" if run.code == -signal.SIGKILL else None


def terminate(run: Run, delay: float, failures: list[str]) -> str | None:
    """SIGTERM: the run must end by itself, ask to be resumed, and say so in one line."""
    said, begin = len(run.stderr.splitlines()), time.monotonic()
    with contextlib.suppress(ProcessLookupError):
        run.process.send_signal(signal.SIGTERM)
    code = run.wait(PATIENCE)
    if code == 0:
        return None  # it had just finished
    if code == -signal.SIGTERM and not run.stderr and delay < STARTING:
        return "before it could hear"
    where = f"{run.stderr_file.name}, {stage_of(run.workdir)}"
    if code is None:
        failures.append(f"still there {PATIENCE:.0f} s after SIGTERM: {where}")
        return "not heard"
    if code != RESUME:
        failures.append(f"exit code {code} after SIGTERM: {where}")
    lines = [line for line in run.stderr.splitlines()[said:] if "same command" in line]
    if len(lines) != 1:
        failures.append(f"{len(lines)} lines say how to go on: {where}")
    return f"ended after {'more than 5' if time.monotonic() - begin > 5 else 'at most 5'} s"


def chain(campaign: Campaign, what: str, number: int, most: int) -> None:
    """One run, interrupted up to `most` times and resumed each time; the last time it may finish."""
    interrupt = {"kill": kill, "terminate": terminate}[what]
    begin, interruptions = time.monotonic(), []
    with campaign.trial(what, number) as (directory, rng, failures):
        workdir = directory / "run"
        for link in range(most):
            aim = bool(rng.random() < 0.5)
            # the first falls anywhere; those after it come sooner, so that many interruptions cost few whole runs
            delay = rng.uniform(0, campaign.seconds * (1.0 if link == 0 else 0.4))
            writes, into = int(rng.integers(1, 13)), rng.uniform(0, 0.06)
            left = temporaries(workdir)
            with Run(campaign, workdir) as run:
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
            interruptions.append(
                {
                    "stage": stage_of(workdir),
                    "after": round(time.monotonic() - started, 2),
                    "aimed": aim,
                    "in_write": sorted(temporaries(workdir) - left),
                    "came": came,
                }
            )
            if failures:
                break
        else:
            with Run(campaign, workdir) as run:
                failures += run.finish()
        if not failures:
            failures += difference(workdir, campaign.reference)
        litter = sorted(temporaries(workdir))
    campaign.add(
        what=what, number=number, interruptions=interruptions, failures=failures, litter=litter,
        seconds=round(time.monotonic() - begin, 1),
    )  # fmt: skip


def interrupted(campaign: Campaign, what: str, args: argparse.Namespace) -> dict[str, Any]:
    """Chains until there were so many interruptions."""

    def all_interruptions() -> list[dict[str, Any]]:
        every = [one for row in campaign.of(what) for one in row["interruptions"]]
        return [one for one in every if one["came"] != "before it could hear"]

    while len(all_interruptions()) < args.times and (args.chains is None or len(campaign.of(what)) < args.chains):
        missing = args.times - len(all_interruptions())
        chain(campaign, what, len(campaign.of(what)), min(args.most, missing))
    found, rows = all_interruptions(), campaign.of(what)
    return {
        "interruptions": len(found),
        "whole_runs": len(rows),
        "by_stage": Counter(one["stage"] for one in found),
        "in_a_checkpoint": sum(any("orbax" in name for name in one["in_write"]) for one in found),
        "in_another_file": sum(any("orbax" not in name for name in one["in_write"]) for one in found),
        "came": Counter(one["came"] for one in found),
        "left_over": sum(bool(row["litter"]) for row in rows),
    }


# ---- damaged


def halfway(campaign: Campaign, stage: str) -> Path:
    """A workdir whose stage was killed when it had two checkpoints; made once."""
    directory = campaign.directory / "halfway" / stage
    workdir, kept = directory / "run", directory / "made"
    checkpoints = workdir / DAMAGED[stage]
    while not kept.exists():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        unfinished(campaign.directory / "reference", workdir, stage)
        shutil.rmtree(checkpoints.parent if stage == "train" else workdir / stage, ignore_errors=True)
        with Run(campaign, workdir, [stage]) as run:
            found = run.wait_until(lambda: len(steps_in(checkpoints)) >= 2, LONGEST)
        if not found:
            raise SystemExit(f"{stage} could not be stopped halfway: {run.stderr}")
        if len(steps_in(checkpoints)) == 2 and not (workdir / stage / "done.json").exists():
            kept.write_text(f"{steps_in(checkpoints)}\n")
    return workdir


def unfinished(reference: Path, workdir: Path, stage: str) -> None:
    """Copy a finished workdir without what this stage and those after it made; of train, the phases stay."""
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
    """Flip a bit of one file or cut it short; half the time any file, half the time a large one. Says what it did."""
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
    """Damage the newest checkpoint, then run: refused in one line, or the reference's numbers."""
    begin, stage = time.monotonic(), "sae" if number % 4 == 3 else "train"
    source = halfway(campaign, stage)
    with campaign.trial("damage", number) as (directory, rng, failures):
        workdir = directory / "run"
        shutil.copytree(source, workdir)
        earlier, newest = steps_in(workdir / DAMAGED[stage])
        what = damage_a_file(workdir / DAMAGED[stage] / str(newest), rng)
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
            resumed = re.findall(r"going on from (?:step|epoch) (\d+)", run.stderr)
            names = {str(newest): "went on from it", str(earlier): "went on from the one before"}
            came = names.get(resumed[-1] if resumed else "", "began anew")
            failures += difference(workdir, campaign.reference, [stage])
        else:
            failures.append(came)
    campaign.add(
        what="damage", number=number, stage=stage, damage=what, came=came, failures=failures,
        seconds=round(time.monotonic() - begin, 1),
    )  # fmt: skip


def empty_state(campaign: Campaign) -> State:
    """The shapes of a dense phase's state."""
    config = load_config(str(campaign.config), {})
    dataset = load_dataset(config.data, config.seed)
    params = init_params(build_model(config, len(dataset.class_names)), config, config.seed)
    average = params if config.train.ema else None
    key = jax.random.key_data(jax.random.key(0))
    return State(params, average, make_optimizer(config, config.train.gated).init(params), key, np.int32(0))


def damaged_directly(campaign: Campaign, numbers: Iterable[int]) -> None:
    """Damage the newest checkpoint, then restore: HeadSteerError, or what was saved at the step that it says."""
    source = halfway(campaign, "train") / DAMAGED["train"]
    like, truth = empty_state(campaign), {}
    for step in steps_in(source):
        tree, about = Checkpoints(source, 2).restore(like, step)
        truth[step] = {name: mark(leaf) for name, leaf in named_leaves(tree)}, mark(about)
    earlier, newest = sorted(truth)
    for number in numbers:
        begin = time.monotonic()
        with campaign.trial("damage directly", number) as (directory, rng, failures):
            shutil.copytree(source, directory / "last")
            what = damage_a_file(directory / "last" / str(newest), rng)
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
                step = about.get("step")
                came = {newest: "restored", earlier: "restored the one before"}.get(step, f"restored step {step}")
                leaves, true_about = truth.get(step, ({}, ""))
                failures += [f"differs: {name}" for name, leaf in named_leaves(tree) if mark(leaf) != leaves.get(name)]
                failures += ["differs: about"] if mark(about) != true_about else []
        campaign.add(
            what="damage directly", number=number, damage=what, came=came, failures=failures,
            seconds=round(time.monotonic() - begin, 2),
        )  # fmt: skip


def damage(campaign: Campaign, what: str, args: argparse.Namespace) -> dict[str, Any]:
    numbers = range(len(campaign.of(what)), args.times)
    if what == "damage directly":
        damaged_directly(campaign, numbers)
    else:
        for number in numbers:
            damaged_run(campaign, number)
    rows = campaign.of(what)
    return {"came": Counter(row["came"] for row in rows)}


# ---- a full disk


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A file system of so many bytes in memory; gives a function that changes its size."""
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
    """Bytes on a tmpfs: whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in directory.rglob("*") if path.is_file())


def filled(campaign: Campaign, stage: str, number: int) -> None:
    """A stage on a disk that has room for a part of it: one line; with more room the same command finishes."""
    begin, reference = time.monotonic(), campaign.directory / "reference"
    stages = STAGES[: STAGES.index(stage) + 1]
    with campaign.trial(f"full {stage}", number) as (directory, rng, failures):
        before, workdir = directory / "before", directory / "disk"  # a disk of its own: what is said goes elsewhere
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


def full(campaign: Campaign, what: str, args: argparse.Namespace) -> dict[str, Any]:
    for number in range(args.times):
        for stage in args.stages:
            if not any(row["stage"] == stage and row["number"] == number for row in campaign.of(what)):
                filled(campaign, stage, number)
    rows = campaign.of(what)
    return {"came": {stage: Counter(row["came"] for row in rows if row["stage"] == stage) for stage in args.stages}}


# ---- the command line

DO: dict[str, tuple[Callable[..., dict[str, Any]], int, str]] = {
    "kill": (interrupted, 50, "SIGKILL at random moments"),
    "terminate": (interrupted, 20, "SIGTERM at random moments"),
    "damage": (damage, 100, "changed and truncated checkpoints"),
    "full": (full, 3, "a disk that fills up in each stage"),
}


def stage_names(text: str) -> list[str]:
    """Raises ArgumentTypeError where there is no such stage."""
    names = text.split(",")
    if unknown := set(names) - set(STAGES):
        raise argparse.ArgumentTypeError(f"there is no stage {min(unknown)!r}; allowed are {', '.join(STAGES)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, help_text in {"reference": "an uninterrupted run"}.items() | {n: d[2] for n, d in DO.items()}.items():
        command = commands.add_parser(name, help=help_text)
        command.add_argument("--workdir", type=Path, required=True)
        command.add_argument("--seed", type=int, default=0, help="of what happens when (default: %(default)s)")
        if name in DO:
            command.add_argument("--times", type=int, default=DO[name][1], help="how often (default: %(default)s)")
        if name in ("kill", "terminate"):
            command.add_argument("--most", type=int, default=8, help="in one run (default: %(default)s)")
            command.add_argument("--chains", type=int, help="at most so many runs, however few the interruptions")
        if name == "damage":
            command.add_argument("--direct", action="store_true", help="restore in this process instead of running")
        if name == "full":
            command.add_argument("--stages", type=stage_names, default=list(STAGES))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every run is ended and every disk unmounted
    campaign = Campaign(args.workdir, args.seed)
    campaign.make_reference()
    if args.what == "reference":
        figures: dict[str, Any] = {"digests": len(campaign.reference)}
        failed = []
    else:
        what = "damage directly" if args.what == "damage" and args.direct else args.what
        figures = DO[args.what][0](campaign, what, args)
        rows = campaign.of(what)
        failed = [row for row in rows if row["failures"]]
        figures |= {"trials": len(rows), "failed": len(failed)}
        figures["seconds_per_trial"] = round(float(np.mean([row["seconds"] for row in rows])), 2) if rows else None
    print(json.dumps({"benchmark": args.what, "reference_seconds": round(campaign.seconds, 1), **figures}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
