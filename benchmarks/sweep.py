"""Measures what a sweep costs next to one forward pass, and whether it gives the same gates and answers.

    headsteer run --stages=train,sae
    python benchmarks/sweep.py runs/double_digits [--settings=200] [--repeats=5]

Everything is compared with `plain_forward` below: one jitted forward pass of the whole gated model for each setting, at
the batch size that is fastest. Times are medians over repeats and exclude compilation. The last line is one JSON object
with the figures. The machine should have nothing else to do.
"""

import argparse
import ctypes
import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.config import Config
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import Split, gather_images
from headsteer_jax.model.passes import padded_chunks
from headsteer_jax.model.vit import Intervention, TrainedModel
from headsteer_jax.runs import Run, load_run
from headsteer_jax.runtime.progress import progress
from headsteer_jax.sae.autoencoder import encode_split
from headsteer_jax.steer.catalogue import find_strategy, per_class_strategy
from headsteer_jax.steer.flips import gate_effect
from headsteer_jax.steer.gates import LayerGates, gates_to_pattern
from headsteer_jax.steer.steering import GateProgram, Steering, apply_steering
from headsteer_jax.steer.strategies import LatentStatistics, latent_statistics
from headsteer_jax.steer.sweep import (
    SplitSweep,
    bound_logits,
    gate_jacobian,
    make_split_sweep,
    sweep_by_flips,
    sweep_by_gates,
)
from headsteer_jax.steer.table import Table, compile_table_program, fill_table
from headsteer_jax.steer.tally import unpack_bits

STRATEGIES = ("class", "global", "random", "matched_random", "gate_aligned", "strongest")
RANDOM_SEEDS = 20
MODES = ("add", "scale", "clamp", "ablate")


def alpha_grid(count: int) -> np.ndarray:
    """Make a grid of alphas from -8 to 16 that is dense around 0 and contains it."""
    below = count // 4
    return np.concatenate([-np.geomspace(8, 0.05, below), [0.0], np.geomspace(0.05, 16, count - 1 - below)])


def strongest(stats: LatentStatistics, label: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose the latents with the highest mean activation on the class: a user's own strategy, the sixth."""
    latents = np.argsort(-stats.class_frequency[label] * stats.strength)[:16]
    return latents, np.ones(16)


class Bench:
    """A run, the split that is swept, and the choices of latents, all of them made before anything is timed."""

    def __init__(self, run: Run, memory: int) -> None:
        self.run, self.trained = run, with_section(run.trained, "machine", sweep_memory=memory)
        self.config, self.params, self.classes = self.trained.config, self.trained.params, len(run.dataset.class_names)
        test = run.dataset.test
        self.split = Split(gather_images(test.images, np.arange(len(test.labels))), test.labels)
        self.program = compile_table_program(self.trained, self.split)
        self.gates = GateProgram(self.trained)
        self.kernel = gate_jacobian(self.trained, run.x_train)  # [D, G], of gates that are linear
        began = time.perf_counter()
        self.sae = run.autoencoder(0)
        self.steered = self._steerings()
        self.effects = [gate_effect(self.sae.decoder, self.kernel, 16)]
        self.seconds_choosing = time.perf_counter() - began

    def _steerings(self) -> list[Steering]:
        """Let every strategy choose once, and `random` some more times."""
        train, steer = self.run.dataset.train, self.config.steer
        by_class = [np.flatnonzero(train.labels == label)[:20] for label in range(self.classes)]
        indices = np.concatenate(by_class)
        evidence = Split(gather_images(train.images, indices), train.labels[indices])
        table = fill_table(self.program, self.params, evidence, "train")
        outcomes = table.outcomes(evidence.labels)
        z_NF = encode_split(self.sae, self.run.x_train)
        stats = latent_statistics(z_NF, train.labels, self.classes, self.sae.decoder, self.kernel, (outcomes, outcomes))
        strategies = {
            name: per_class_strategy(strongest, name) if name == "strongest" else find_strategy(name)
            for name in STRATEGIES
        }
        choices = [choose(stats, steer, np.random.default_rng([0, 1])) for choose in strategies.values()]
        draws = [np.random.default_rng([0, 2, number]) for number in range(RANDOM_SEEDS)]
        choices += [strategies["random"](stats, steer, rng) for rng in draws]
        return [Steering(self.sae, stats.strength, choice) for choice in choices]

    def table(self, split: Split) -> Table:
        return fill_table(self.program, self.params, split, "test")

    def job(self, split: Split, table: Table) -> SplitSweep:
        return make_split_sweep("test", split, table, [self.steered], 0, bound_logits(self.trained, table.x))

    def look_up(self, job: SplitSweep, alphas: np.ndarray, predicted: bool = False) -> list[Any]:
        """Sweep every setting by the label, or with `predicted` by the predicted class as well."""
        if not predicted:
            job = steered_by_label(job)
        return list(sweep_by_flips(job, alphas, self.gates, self.effects, self.classes))

    def sweep(self, alphas: np.ndarray, predicted: bool = False, split: Split | None = None) -> list[Any]:
        """Sweep from images to counts and bits."""
        split = split or self.split
        return self.look_up(self.job(split, self.table(split)), alphas, predicted)


def steered_by_label(job: SplitSweep) -> SplitSweep:
    """Keep the rows that steer an image by its label, and drop those of its predicted class."""
    count = len(job.split.labels)
    rows = job.rows._replace(**{name: getattr(job.rows, name)[:count] for name in job.rows._fields[:4]})
    return job._replace(used=(job.used[0][:count],), rows=rows)


def with_section(trained: TrainedModel, section: str, **fields: Any) -> TrainedModel:
    """Change fields of one section of a trained model's config."""
    config = trained.config
    changed = getattr(config, section).model_copy(update=fields)
    return trained._replace(config=config.model_copy(update={section: changed}))


def plain_forward(trained: TrainedModel) -> Callable[..., Any]:
    """Compile a pass of the whole gated model on steered images: it returns [B] patterns and [B] predictions."""
    config = trained.config

    @jax.jit
    def forward(params: Any, images: jax.Array, steering: Steering, class_B: jax.Array, alpha: jax.Array) -> Any:
        def steer(x_BD: jax.Array) -> jax.Array:
            return apply_steering(steering, x_BD, class_B, alpha, config.steer)

        pixels = preprocess(images, config.data)
        intervention = Intervention(gate_input=steer)
        logits, out = trained.model.apply(params, pixels, interventions={config.sae_layer: intervention})
        gates = LayerGates(config, config.sae_layer)
        return gates_to_pattern(gates.join(out["gates"][config.sae_layer])), jnp.argmax(logits, axis=-1)

    return forward


def steer_split(
    forward: Callable[..., Any], params: Any, split: Split, batch: int, steering: Steering, alpha: float
) -> Any:
    """Run one setting over a split by plain forward passes: patterns and predictions [N]."""
    parts = [
        jax.device_get(forward(params, split.images[i], steering, split.labels[i], np.float32(alpha)))
        for i in padded_chunks(0, len(split.labels), batch)
    ]
    return [np.concatenate(part)[: len(split.labels)] for part in zip(*parts, strict=True)]


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Measure the median time of a call, after one call that compiles."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def peak_gflops(rows: int, inner: int, outer: int) -> float:
    """Measure the rate of a float32 matrix product, the best of 20."""
    a, b = jnp.ones((rows, inner)), jnp.ones((inner, outer))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, b))
    best = np.inf
    for _ in range(20):
        began = time.perf_counter()
        jax.block_until_ready(product(a, b))
        best = min(best, time.perf_counter() - began)
    return 2 * rows * inner * outer / best / 1e9


def pass_gflop(config: Config, images: int, classes: int) -> dict[str, float]:
    """Count the operations, in 1e9, of the matrix products of a plain pass and of the pass that fills the table."""
    m, d = config.model, config.model.width
    tokens = (config.data.image_size // m.patch) ** 2 + 1 + m.registers
    hidden, patterns = round(m.mlp_ratio * d), 2 ** LayerGates(config, config.sae_layer).count
    embed = 2 * (tokens - 1) * m.patch**2 * config.data.channels * d
    block = 2 * tokens * (4 * d * d + 2 * d * hidden) + 4 * tokens * tokens * d
    cls_block = 2 * (2 * d * d + 2 * d * hidden) + 4 * tokens * d + 4 * tokens * d * d
    before = embed + (m.depth - 1) * block
    head = 2 * d * classes
    last_table = 4 * tokens * d * d + 2 * d * d + 4 * tokens * d + 2 * d * d
    last_table += patterns * (2 * m.heads * d + 4 * d * hidden + head)
    return {
        "plain": images * (before + cls_block + head) / 1e9,
        "before": images * before / 1e9,
        "table": images * last_table / 1e9,
    }


def digest(swept: list[Any]) -> str:
    """Hash every count and bit of a sweep."""
    content = hashlib.sha256()
    for *_, tallies, _ in swept:
        for tally in tallies:
            for values in tally:
                content.update(np.ascontiguousarray(values).tobytes())
    return content.hexdigest()


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> float:
    """Read this process's memory in MiB: VmRSS, or VmHWM, its largest value since reset_peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def print_digest(workdir: str, memory: int) -> None:
    """Sweep, and print a digest of the result and how much memory it took; runs in a process of its own."""
    bench = Bench(load_run(workdir), memory)
    images = np.zeros((bench.program.size * jax.device_count(), *bench.split.images.shape[1:]), np.uint8)
    chunk = Split(images, np.zeros(len(images), np.int32))
    first_job = bench.job(chunk, bench.table(chunk))  # compiles and loads all that the sweep uses
    bench.look_up(first_job, alpha_grid(41))
    del first_job
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    reset_peak()
    swept = bench.sweep(alpha_grid(41))
    plan = bench.program.run.memory_analysis()
    figures = {
        "devices": jax.device_count(), "memory": memory, "images_at_once": bench.program.size,
        "planned_mib": (plan.temp_size_in_bytes + plan.output_size_in_bytes) / 2**20,
        "grown_mib": resident("VmHWM") - before, "digest": digest(swept),
    }  # fmt: skip
    print(json.dumps(figures))


def measure_digest(workdir: str, memory: int, devices: int) -> dict[str, Any]:
    """Run `print_digest` in another process with so many simulated devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, __file__, workdir, f"--digest={memory}"]
    result = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def compare_settings(bench: Bench, settings: int, batch: int) -> dict[str, Any]:
    """Compare gates and predictions of random settings with plain forward passes, on every image."""
    rng, gates = np.random.default_rng(0), LayerGates(bench.config, bench.config.sae_layer)
    count, labels = len(bench.split.labels), bench.split.labels
    job = bench.job(bench.split, bench.table(bench.split))
    drawn = [
        (n % len(STRATEGIES), MODES[n // len(STRATEGIES) % len(MODES)], float(sign * rng.uniform(0.05, 16)))
        for n in range(settings)
        for sign in [1 if n // (len(STRATEGIES) * len(MODES)) % 2 == 0 else -1]
    ]
    differ = {"gates": 0, "predictions": 0, "settings": 0}
    with progress(settings, "settings against plain passes", "setting") as bar:
        for mode in MODES:
            trained = with_section(bench.trained, "steer", mode=mode)
            forward, program = plain_forward(trained), GateProgram(trained)
            for g, _, alpha in (setting for setting in drawn if setting[1] == mode):
                alphas = np.array(sorted([0.0, float(np.float32(alpha))]))
                a, single = int(np.flatnonzero(alphas)[0]), job._replace(steered=[[bench.steered[g]]])
                if mode == "add":
                    swept = sweep_by_flips(single, alphas, program, bench.effects, bench.classes)
                else:
                    swept = sweep_by_gates(single, alphas, program, bench.classes)
                _, _, (tally, _), _ = next(swept)
                patterns, predictions = steer_split(forward, bench.params, bench.split, batch, bench.steered[g], alpha)
                swept_patterns = unpack_bits(tally.gates[a], count).T @ (1 << np.arange(gates.count))
                answers = job.table.answers[np.arange(count), swept_patterns]
                assert (unpack_bits(tally.right[a], count) == (answers == labels)).all()
                wrong = int((swept_patterns != patterns).sum()), int((answers != predictions).sum())
                differ["gates"] += wrong[0]
                differ["predictions"] += wrong[1]
                differ["settings"] += 1
                bar.update(1, f"{differ['gates']} patterns and {differ['predictions']} answers differ")
                if any(wrong):
                    print(f"  {STRATEGIES[g]}, {mode}, alpha {alpha:.4g}: {wrong} patterns and answers differ")
    return differ | {"images": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", help="a run whose stages train and sae are done")
    parser.add_argument("--settings", type=int, default=200, help="random settings that are compared with plain passes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--digest", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.digest:
        print_digest(arguments.workdir, arguments.digest)
        return
    repeats, run = arguments.repeats, load_run(arguments.workdir)
    bench = Bench(run, run.config.machine.sweep_memory)
    config, params, count, alphas = bench.config, bench.params, len(bench.split.labels), alpha_grid(41)
    choices = len(bench.steered)
    print(f"{arguments.workdir}: {count} images, {choices} choices of latents in {bench.seconds_choosing:.1f} s")

    unsteered = jax.jit(lambda p, i: jnp.argmax(run.trained.model.apply(p, preprocess(i, config.data))[0], axis=-1))

    def one_pass(batch: int) -> None:
        for indices in padded_chunks(0, count, batch):
            np.asarray(unsteered(params, bench.split.images[indices]))

    by_batch = {
        batch: median_seconds(functools.partial(one_pass, batch), repeats) for batch in (50, 100, 125, 250, 500)
    }
    batch = min(by_batch, key=by_batch.__getitem__)
    forward = by_batch[batch]
    steered_forward = plain_forward(bench.trained)
    setting = functools.partial(steer_split, steered_forward, params, bench.split, batch, bench.steered[0], 2.0)
    steered = median_seconds(setting, repeats)
    print(f"one plain pass {forward:.3f} s at batch {batch} ({by_batch}); a steered one {steered:.3f} s")

    sweeping = median_seconds(lambda: bench.sweep(alphas), repeats)
    sweeping_twice = median_seconds(lambda: bench.sweep(alphas, predicted=True), repeats)
    sweeping_long = median_seconds(lambda: bench.sweep(alpha_grid(401)), repeats)
    table = bench.table(bench.split)
    job = bench.job(bench.split, table)
    filling = median_seconds(lambda: bench.table(bench.split), repeats)
    looking = median_seconds(lambda: bench.look_up(job, alphas), repeats)
    looking_long = median_seconds(lambda: bench.look_up(job, alpha_grid(401)), repeats)
    encoding = median_seconds(lambda: encode_split(bench.sae, table.x, chunk=1000), repeats)
    half = Split(bench.split.images[: count // 2], bench.split.labels[: count // 2])
    sweeping_half = median_seconds(lambda: bench.sweep(alphas, split=half), repeats)
    settings = choices * len(alphas)
    figures: dict[str, Any] = {
        "workdir": arguments.workdir, "images": count, "device": str(jax.devices()[0]), "choices": choices,
        "alphas": len(alphas), "settings": settings, "batch": batch, "plain_pass_s": forward,
        "plain_steered_pass_s": steered, "sweep_s": sweeping, "sweep_over_pass": sweeping / forward,
        "faster_per_setting": steered / (sweeping / settings),
        "both_namings": {
            "sweep_s": sweeping_twice, "over_pass": sweeping_twice / forward, "settings": 2 * settings,
            "faster_per_setting": steered / (sweeping_twice / (2 * settings)),
        },
        "parts_s": {"pass_and_table": filling, "look_ups": looking, "of_which_encoding": encoding},
        "alphas_401": {
            "sweep_s": sweeping_long, "over_41": sweeping_long / sweeping, "look_ups_s": looking_long,
        },
        "half_the_images": sweeping_half / sweeping,
    }  # fmt: skip
    gflop = pass_gflop(config, count, bench.classes)
    m = config.model
    peak = max(peak_gflops(64 * batch, m.width, round(m.width * m.mlp_ratio)), peak_gflops(2048, 2048, 2048))
    figures["matrix_products"] = {
        "peak_gflops": peak, "plain_gflop": gflop["plain"], "plain_of_peak": gflop["plain"] / forward / peak,
        "table_pass_gflop": gflop["before"] + gflop["table"],
        "table_pass_of_peak": (gflop["before"] + gflop["table"]) / filling / peak,
    }  # fmt: skip
    print(f"sweep of {settings} settings: {sweeping:.3f} s, {sweeping / forward:.2f} passes")
    if arguments.settings:
        figures["identity"] = compare_settings(bench, arguments.settings, batch)
    if jax.default_backend() == "cpu" and sys.platform == "linux":
        digests = {
            (memory, devices): measure_digest(arguments.workdir, memory, devices)
            for memory, devices in ((256, 1), (2048, 1), (2048, 8))
        }
        figures["memory"] = [digests[256, 1], digests[2048, 1]]
        figures["devices_1_and_8_equal"] = digests[2048, 1]["digest"] == digests[2048, 8]["digest"]
        figures["budgets_equal"] = digests[2048, 1]["digest"] == digests[256, 1]["digest"]
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
