"""How much a whole sweep costs next to one forward pass, and whether it gives the same gates and answers.

    python run.py --stages=train,sae
    python benchmarks/sweep.py runs/double_digits [--settings=200] [--repeats=5]

The plain way, against which everything is measured, is `plain` below: one jitted forward pass of the whole gated model
for each setting, at its best batch size. Times are medians over repeats, compilation apart; the last line is one JSON
object with the figures. The machine should have nothing else to do.
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
from headsteer_jax.model.vit import Intervention
from headsteer_jax.runs import Run, load_run
from headsteer_jax.runtime.progress import progress
from headsteer_jax.sae.autoencoder import encode_all, select_member
from headsteer_jax.steer.flips import gate_effect
from headsteer_jax.steer.steering import GateProgram, Steering, apply_steering
from headsteer_jax.steer.strategies import (
    Choice,
    LatentStatistics,
    Outcomes,
    find_strategy,
    latent_statistics,
    per_class_strategy,
)
from headsteer_jax.steer.sweep import SplitSweep, make_split_sweep, sweep_by_flips, sweep_by_gates
from headsteer_jax.steer.table import Table, compile_table_program, fill_table, gates_to_pattern
from headsteer_jax.steer.tally import unpack_bits

STRATEGIES = ("class", "global", "random", "matched_random", "gate_aligned", "strongest")
RANDOM_SEEDS = 20
MODES = ("add", "scale", "clamp", "ablate")


def grid(count: int) -> np.ndarray:
    """So many alphas from -8 to 16, dense around 0, with 0."""
    below = count // 4
    return np.concatenate([-np.geomspace(8, 0.05, below), [0.0], np.geomspace(0.05, 16, count - 1 - below)])


def strongest(stats: LatentStatistics, label: int) -> tuple[np.ndarray, np.ndarray]:
    """A user's own strategy, the sixth: the latents with the highest mean activation on the class."""
    latents = np.argsort(-stats.class_frequency[label] * stats.strength)[:16]
    return latents, np.ones(16)


class Bench:
    """A run, the split that is swept, and the choices of latents, all made before the clock starts."""

    def __init__(self, run: Run, memory: int) -> None:
        self.run, self.config = run, with_steer(run.config, memory=memory)
        config, dataset, self.classes = self.config, run.dataset, len(run.dataset.class_names)
        self.split = Split(gather_images(dataset.test.images, np.arange(len(dataset.test.labels))), dataset.test.labels)
        self.program = compile_table_program(run.model, run.params, self.split, config)
        self.gates = GateProgram(run.model, run.params, config)
        linear = run.params["params"][f"layers_{config.sae_layer}"]["decide"]["linear"]
        self.linear = np.asarray(linear["kernel"]), np.asarray(linear["bias"])
        began = time.perf_counter()
        self.sae = select_member(run.saes, 0)
        decoder = np.asarray(self.sae.W_d) / run.scaling.scale
        self.steered = [self._steering(choice) for choice in self._choices(decoder)]
        self.effects = [gate_effect(decoder, self.linear[0], 16)]
        self.choosing = time.perf_counter() - began

    def _choices(self, decoder: np.ndarray) -> list[Choice]:
        run, labels = self.run, self.run.dataset.train.labels
        z_NF = encode_all(self.sae, run.scaling, run.x_train, self.config.sae.inference_k)
        some = np.concatenate([np.flatnonzero(labels == label)[:20] for label in range(self.classes)])
        train = Split(gather_images(run.dataset.train.images, some), labels[some])
        seen = fill_table(self.program, run.params, train, "train")
        known = Outcomes(train.labels, seen.gate_logits, seen.answers == train.labels[:, None])
        stats = latent_statistics(z_NF, labels, self.classes, decoder, self.linear[0], (known, known))
        self.strength, steer = stats.strength, self.config.steer
        named = {
            name: per_class_strategy(strongest, name) if name == "strongest" else find_strategy(name)
            for name in STRATEGIES
        }
        chosen = [choose(stats, steer, np.random.default_rng([0, 1])) for choose in named.values()]
        return chosen + [named["random"](stats, steer, np.random.default_rng([0, 2, n])) for n in range(RANDOM_SEEDS)]

    def _steering(self, choice: Choice) -> Steering:
        return Steering(self.sae, self.run.scaling, self.strength, choice)

    def table(self, split: Split) -> Table:
        return fill_table(self.program, self.run.params, split, "test")

    def job(self, split: Split, table: Table) -> SplitSweep:
        kernel, bias = self.linear
        size = np.abs(table.x) @ np.abs(kernel) + np.abs(bias)
        return make_split_sweep("test", split, table, [self.steered], 0, size)

    def look_up(self, job: SplitSweep, alphas: np.ndarray, both: bool = False) -> list[Any]:
        """Every setting; by the label alone, or by the predicted class as well."""
        if not both:
            count = len(job.split.labels)
            job = job._replace(used=(job.used[0][:count],), rows=by_label(job))
        return list(sweep_by_flips(job, alphas, self.gates, self.effects, self.config.sae.inference_k, self.classes))

    def sweep(self, alphas: np.ndarray, both: bool = False, split: Split | None = None) -> list[Any]:
        """From images to counts and bits."""
        split = split or self.split
        return self.look_up(self.job(split, self.table(split)), alphas, both)


def by_label(job: SplitSweep) -> Any:
    count = len(job.split.labels)
    return job.rows._replace(**{name: getattr(job.rows, name)[:count] for name in job.rows._fields[:4]})


def with_steer(config: Config, **fields: Any) -> Config:
    return config.model_copy(update={"steer": config.steer.model_copy(update=fields)})


def plain(run: Run, config: Config) -> Callable[..., Any]:
    """The plain way: the whole gated model on steered images, [B] patterns and [B] predictions."""

    @jax.jit
    def forward(params: Any, images: jax.Array, one: Steering, class_B: jax.Array, alpha: jax.Array) -> Any:
        def changed(x_BD: jax.Array) -> jax.Array:
            return apply_steering(one, x_BD, class_B, alpha, config.sae.inference_k, config.steer)

        logits, out = run.model.apply(params, preprocess(images, config.data), interventions={config.sae_layer: Intervention(gate_input=changed)})
        return gates_to_pattern(out["gates"][config.sae_layer]), jnp.argmax(logits, axis=-1)

    return forward


def over(forward: Callable[..., Any], run: Run, split: Split, batch: int, one: Steering, alpha: float) -> Any:
    """One setting over a split: patterns and predictions [N]."""
    parts = [
        jax.device_get(forward(run.params, split.images[i], one, split.labels[i], np.float32(alpha)))
        for i in padded_chunks(0, len(split.labels), batch)
    ]
    return [np.concatenate(part)[: len(split.labels)] for part in zip(*parts, strict=True)]


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median, after one call that compiles."""
    work()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return float(np.median(found))


def peak_gflops(rows: int, inner: int, outer: int) -> float:
    """float32 matrix product, the rate of the best of 20."""
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
    """Matrix products of a plain pass, and of the pass that fills the table, in 1e9 operations."""
    m, d = config.model, config.model.width
    tokens = (config.data.image_size // m.patch) ** 2 + 1 + m.registers
    hidden, patterns = round(m.mlp_ratio * d), 2**m.heads
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
    """Of every count and bit."""
    found = hashlib.sha256()
    for *_, tallies, _ in swept:
        for tally in tallies:
            for values in tally:
                found.update(np.ascontiguousarray(values).tobytes())
    return found.hexdigest()


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> float:
    """MiB of this process: VmRSS now, or VmHWM, the most since reset_peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def child(workdir: str, memory: int) -> None:
    """In a process of its own: the sweep's result as a digest, and how much memory it took."""
    bench = Bench(load_run(workdir), memory)
    images = np.zeros((bench.program.size * jax.device_count(), *bench.split.images.shape[1:]), np.uint8)
    warm = Split(images, np.zeros(len(images), np.int32))
    warm_job = bench.job(warm, bench.table(warm))  # compiles and loads what is used, on one chunk
    bench.look_up(warm_job, grid(41))
    del warm_job
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    reset_peak()
    swept = bench.sweep(grid(41))
    plan = bench.program.run.memory_analysis()
    figures = {
        "devices": jax.device_count(), "memory": memory, "images_at_once": bench.program.size,
        "planned_mib": (plan.temp_size_in_bytes + plan.output_size_in_bytes) / 2**20,
        "grown_mib": resident("VmHWM") - before, "digest": digest(swept),
    }  # fmt: skip
    print(json.dumps(figures))


def in_child(workdir: str, memory: int, devices: int) -> dict[str, Any]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, __file__, workdir, f"--child={memory}"]
    result = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def identity(bench: Bench, settings: int, batch: int) -> dict[str, Any]:
    """Gates and predictions of random settings, every image, against the plain way."""
    rng, heads = np.random.default_rng(0), bench.config.model.heads
    count, labels = len(bench.split.labels), bench.split.labels
    job = bench.job(bench.split, bench.table(bench.split))
    drawn = [
        (n % len(STRATEGIES), MODES[n // len(STRATEGIES) % len(MODES)], float(sign * rng.uniform(0.05, 16)))
        for n in range(settings)
        for sign in [1 if n // (len(STRATEGIES) * len(MODES)) % 2 == 0 else -1]
    ]
    differ = {"gates": 0, "predictions": 0, "settings": 0}
    with progress(settings, "settings against the plain way", "setting") as bar:
        for mode in MODES:
            config = with_steer(bench.config, mode=mode)
            forward, program = plain(bench.run, config), GateProgram(bench.run.model, bench.run.params, config)
            for g, _, alpha in (one for one in drawn if one[1] == mode):
                alphas = np.array(sorted([0.0, float(np.float32(alpha))]))
                place, single = int(np.flatnonzero(alphas)[0]), job._replace(steered=[[bench.steered[g]]])
                if mode == "add":
                    swept = sweep_by_flips(
                        single, alphas, program, bench.effects, config.sae.inference_k, bench.classes
                    )
                else:
                    swept = sweep_by_gates(single, alphas, program, bench.classes)
                _, _, (tally, _), _ = next(swept)
                patterns, predictions = over(forward, bench.run, bench.split, batch, bench.steered[g], alpha)
                ours = unpack_bits(tally.gates[place], count).T @ (1 << np.arange(heads))
                answers = job.table.answers[np.arange(count), ours]
                assert (unpack_bits(tally.right[place], count) == (answers == labels)).all()
                wrong = int((ours != patterns).sum()), int((answers != predictions).sum())
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
    parser.add_argument("--settings", type=int, default=200, help="random settings compared with the plain way")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.workdir, arguments.child)
        return
    repeats, run = arguments.repeats, load_run(arguments.workdir)
    bench = Bench(run, run.config.machine.sweep_memory)
    config, count, alphas = bench.config, len(bench.split.labels), grid(41)
    choices = len(bench.steered)
    print(f"{arguments.workdir}: {count} images, {choices} choices of latents in {bench.choosing:.1f} s")

    unsteered = jax.jit(lambda p, i: jnp.argmax(run.model.apply(p, preprocess(i, config.data))[0], axis=-1))

    def one_pass(batch: int) -> None:
        for indices in padded_chunks(0, count, batch):
            np.asarray(unsteered(run.params, bench.split.images[indices]))

    by_batch = {batch: seconds(functools.partial(one_pass, batch), repeats) for batch in (50, 100, 125, 250, 500)}
    batch = min(by_batch, key=by_batch.__getitem__)
    forward = by_batch[batch]
    one_setting = plain(run, config)
    steered = seconds(lambda: over(one_setting, run, bench.split, batch, bench.steered[0], 2.0), repeats)
    print(f"one plain pass {forward:.3f} s at batch {batch} ({by_batch}); a steered one {steered:.3f} s")

    whole = seconds(lambda: bench.sweep(alphas), repeats)
    both = seconds(lambda: bench.sweep(alphas, both=True), repeats)
    long = seconds(lambda: bench.sweep(grid(401)), repeats)
    table = bench.table(bench.split)
    job = bench.job(bench.split, table)
    filling = seconds(lambda: bench.table(bench.split), repeats)
    looking = seconds(lambda: bench.look_up(job, alphas), repeats)
    looking_long = seconds(lambda: bench.look_up(job, grid(401)), repeats)
    encoding = seconds(lambda: encode_all(bench.sae, run.scaling, table.x, config.sae.inference_k, chunk=1000), repeats)
    half = Split(bench.split.images[: count // 2], bench.split.labels[: count // 2])
    half_time = seconds(lambda: bench.sweep(alphas, split=half), repeats)
    settings = choices * len(alphas)
    figures: dict[str, Any] = {
        "workdir": arguments.workdir, "images": count, "device": str(jax.devices()[0]), "choices": choices,
        "alphas": len(alphas), "settings": settings, "batch": batch, "plain_pass_s": forward,
        "plain_steered_pass_s": steered, "sweep_s": whole, "sweep_over_pass": whole / forward,
        "faster_per_setting": steered / (whole / settings),
        "both_namings": {"sweep_s": both, "over_pass": both / forward, "settings": 2 * settings,
                         "faster_per_setting": steered / (both / (2 * settings))},
        "parts_s": {"pass_and_table": filling, "look_ups": looking, "of_which_encoding": encoding},
        "alphas_401": {"sweep_s": long, "over_41": long / whole, "look_ups_s": looking_long},
        "half_the_images": half_time / whole,
    }  # fmt: skip
    gflop = pass_gflop(config, count, bench.classes)
    m = config.model
    peak = max(peak_gflops(64 * batch, m.width, round(m.width * m.mlp_ratio)), peak_gflops(2048, 2048, 2048))
    figures["matrix_products"] = {
        "peak_gflops": peak, "plain_gflop": gflop["plain"], "plain_of_peak": gflop["plain"] / forward / peak,
        "table_pass_gflop": gflop["before"] + gflop["table"],
        "table_pass_of_peak": (gflop["before"] + gflop["table"]) / filling / peak,
    }  # fmt: skip
    print(f"sweep of {settings} settings: {whole:.3f} s, {whole / forward:.2f} passes")
    if arguments.settings:
        figures["identity"] = identity(bench, arguments.settings, batch)
    if jax.default_backend() == "cpu" and sys.platform == "linux":
        children = {
            (memory, devices): in_child(arguments.workdir, memory, devices)
            for memory, devices in ((256, 1), (2048, 1), (2048, 8))
        }
        figures["memory"] = [children[256, 1], children[2048, 1]]
        figures["devices_1_and_8_equal"] = children[2048, 1]["digest"] == children[2048, 8]["digest"]
        figures["budgets_equal"] = children[2048, 1]["digest"] == children[256, 1]["digest"]
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
