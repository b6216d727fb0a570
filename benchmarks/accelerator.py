"""Checks results and measures speed on an accelerator: training, the autoencoders, the sweep and skipping.

    python benchmarks/accelerator.py --out=DIR
    python benchmarks/accelerator.py --out=DIR --parts=1 --run=runs/cpu    # a run that a CPU made, as well
    python benchmarks/accelerator.py --out=DIR --parts=2 --fast            # without the promise of the same bits

There are five parts. Each runs without the others, and its error, if any, is in the results:
1. A CPU, in a process of its own, computes the goldens of a generated model: gates, answers under every pattern, flips,
   steered gates by the table and by the suffix, active latents, and the first training step of the transformer and of
   the autoencoders. This process computes the same from the same parameters, and counts what differs. With --run the
   run's sweep is made again and compared with the stored one.
2. A ViT-S is trained in bfloat16, dense and gated: images a second, and the share of the maker's peak (MFU).
3. Four autoencoders with 384 -> 3,072 latents are trained on 45,000 generated residuals.
4. A ViT-S is swept on generated images, next to one plain forward pass and `run_suffix`: times, and what differs. The
   model computes with exact products, as always in a sweep, and then with bfloat16 and the device's own float32.
5. A ViT-S whose gates drop about half of its patches runs with them masked and skipped: images a second, what differs.

Everything is meant to fit into eight minutes on one GPU: a part that is late leaves out what matters less, and no part
begins after LATE seconds. No network is needed. Training products of float32 are computed as JAX does by default (TF32
on a GPU) and with `highest`; --products chooses for part 1. GPUs use no kernel that adds in any order, as the command
line asks for, unless --fast is given or XLA_FLAGS says something else. Times are medians and exclude compilation. DIR
gets results.json and results.md. The last line printed is one JSON object. With --small everything takes a minute or
two on a CPU.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sweep as sweep_benchmark  # this module and train lie beside this file
from jax.sharding import AxisType, Mesh
from train import CLASSES, our_config

from headsteer_jax.analysis.sweep_file import name_arrays, read_sweep, to_arrays
from headsteer_jax.config import Config, ModelConfig, SAEConfig
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import Dataset, Split, gather_images
from headsteer_jax.model.macs import count_open_macs, peak_tflops
from headsteer_jax.model.passes import padded_chunks
from headsteer_jax.model.skip import make_skipping_forward
from headsteer_jax.model.vit import TrainedModel, build_model, stack_gates, training_form
from headsteer_jax.runs import Run, load_run
from headsteer_jax.runtime.mesh import place, replicated_sharding
from headsteer_jax.runtime.settings import DETERMINISM, request_determinism
from headsteer_jax.sae import train as sae_train
from headsteer_jax.sae.autoencoder import Autoencoder, encode_split, fit_scaling, scale_input
from headsteer_jax.sae.objective import init_weights
from headsteer_jax.sae.residuals import ResidualsInMemory
from headsteer_jax.steer.catalogue import find_strategy
from headsteer_jax.steer.gates import pattern_to_gates
from headsteer_jax.steer.steering import Steering, apply_steering
from headsteer_jax.steer.strategies import Choice
from headsteer_jax.steer.suffix import SuffixSetting, run_suffix
from headsteer_jax.steer.sweep import run_sweep, sweep_by_flips
from headsteer_jax.steer.table import compile_table_program, fill_table
from headsteer_jax.steer.tally import unpack_bits
from headsteer_jax.train.loop import init_state
from headsteer_jax.train.step import make_schedule, make_training_steps

Arrays = dict[str, np.ndarray]
BEGAN = time.perf_counter()
SECONDS = {1: 100, 2: 180, 3: 60, 4: 100, 5: 40}  # what each part may take before it leaves out what matters less
PRECISIONS = ("default", "highest")  # of float32 products
GOLDEN_STRATEGIES = 4  # of those that the goldens steer by
LATE = 420  # seconds after the start, when no part and nothing optional begins
SHAPES = ((32, 8, 4096), (32, 4, 1024), (224, 16, 256))  # image side, patch, batch of training


class Part:
    """The figures of one part, which are printed as they come, and its clock."""

    def __init__(self, number: int, small: bool) -> None:
        self.number, self.small, self.began = number, small, time.perf_counter()
        self.figures: dict[str, Any] = {}

    def note(self, name: str, value: Any) -> None:
        """Record and print a figure; the name `rows` appends a row."""
        self.figures[name] = [*self.figures.get(name, []), value] if name == "rows" else value
        print(f"[{self.number}, {self.seconds():.0f} s] {name}: {json.dumps(value)}", flush=True)

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def early(self, share: float = 0.5) -> bool:
        return self.seconds() < share * SECONDS[self.number] and time.perf_counter() - BEGAN < LATE


def time_call(call: Callable[[], Any]) -> tuple[float, Any]:
    """Measure one call: its seconds and its result."""
    began = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - began, result


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Measure the median time of a call that has been compiled."""
    return float(np.median([time_call(call)[0] for _ in range(repeats)]))


def change_sections(config: Config, **sections: dict[str, Any]) -> Config:
    """Change fields of a config's sections."""
    parts = {name: getattr(config, name).model_copy(update=fields) for name, fields in sections.items()}
    return config.model_copy(update=parts)


def set_precision(precision: str) -> None:
    """Set how float32 products are computed in all threads: `default` or `highest`."""
    jax.config.update("jax_default_matmul_precision", None if precision == "default" else precision)


def correctness(part: Part, args: argparse.Namespace) -> None:
    """Compare with a CPU's goldens and, if there is a run, with its sweep, latents and training steps."""
    compare_with_goldens(part, args)
    if args.run:
        compare_with_run(part, args)


def golden_run(small: bool) -> Run:
    """Generate the model and the images of the goldens, the same in every process but for rounding."""
    config = sweep_config("float32", True)
    config = change_sections(config, train={"batch": 64}, sae={"batch": 256}, model={} if small else {"depth": 6})
    return generate_run("exact", True, config)


def golden_figures(run: Run, choices: list[Choice] | None = None) -> tuple[Arrays, list[Choice]]:
    """Compute what is compared: arrays of integers and bools, which must not differ, and of floats.

    Args:
      choices: of latents, which are steered in place of those that strategies choose here.

    Returns:
      The arrays by name, and the strategies' choices.
    """
    config, trained, split = run.config, run.trained, run.dataset.test
    bench = sweep_benchmark.Bench(run, memory=1024)
    chosen = [steering.choice for steering in bench.steered[:GOLDEN_STRATEGIES]]
    bench.steered = [bench.steered[0]._replace(choice=choice) for choice in choices or chosen]
    table, alphas = bench.table(split), sweep_benchmark.alpha_grid(41)
    arrays: Arrays = {f"table {name}": values for name, values in table._asdict().items()}
    job = bench.job(split, table)
    for setting in sweep_by_flips(job, alphas, bench.gates, bench.effects, bench.classes):
        name = f"strategy {setting.strategy}"
        arrays |= {f"{name} gates": setting.tallies[0].gates, f"{name} right": setting.tallies[0].right}
        assert setting.flips is not None, "the policy target has flips"
        arrays[f"{name} flips"] = np.sort(setting.flips.alpha)[:: len(setting.flips.alpha) // 100 + 1]
    settings = [SuffixSetting({config.sae_layer: bench.steered[0]}, split.labels)]
    suffix = run_suffix(trained, split, settings, alphas[::10], "suffix")
    arrays |= {"suffix gates": suffix.gates[config.sae_layer]["heads"], "suffix answers": suffix.predictions}
    arrays |= {f"chosen latents {i}": np.sort(choice.latents, axis=-1) for i, choice in enumerate(chosen)}
    return arrays | {"latents": encode_split(run.autoencoder(0), run.x_train) > 0}, chosen


def golden_state(run: Run) -> tuple[Any, ...]:
    """Collect the arrays that rounding decides and that both processes must share."""
    return run.trained.params, run.autoencoders.weights, run.autoencoders.scaling, run.x_train


def write_goldens(file: Path, small: bool) -> None:
    """Write the shared arrays, the figures and the training steps of this process's device."""
    run = golden_run(small)
    arrays = {f"state {i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(golden_state(run)))}
    for name, step in STEPS.items():
        before, after, numbers = step(run, jax.devices()[0])
        leaves = jax.tree.leaves((before, after, numbers))
        arrays |= {f"{name} {i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    figures, chosen = golden_figures(run)
    for i, choice in enumerate(chosen):
        arrays |= {f"choice {i} latents": choice.latents, f"choice {i} weights": choice.weights}
    np.savez(file, **arrays, **figures)


def compare_with_goldens(part: Part, args: argparse.Namespace) -> None:
    """Let a CPU make the goldens, and compare figures and training steps of this device with them."""
    with tempfile.TemporaryDirectory() as directory:
        file = args.goldens or Path(directory) / "goldens.npz"
        if not file.exists():
            command = [sys.executable, __file__, f"--write-goldens={file}", *["--small"] * part.small]
            subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)
        goldens = dict(np.load(file))
    part.note("goldens_s", round(part.seconds(), 1))
    run = golden_run(part.small)
    state = golden_state(run)
    leaves = [goldens[f"state {i}"] for i in range(len(jax.tree.leaves(state)))]
    params, weights, scaling, x_ND = jax.tree.unflatten(jax.tree.structure(state), leaves)
    autoencoders = Autoencoder(weights, scaling, run.autoencoders.k)
    run = replace(run, trained=run.trained._replace(params=params), autoencoders=autoencoders, x_train=x_ND)
    numbers = range(sum(name.startswith("choice ") for name in goldens) // 2)
    choices = [Choice(goldens[f"choice {i} latents"], goldens[f"choice {i} weights"]) for i in numbers]
    for name, found in golden_figures(run, choices)[0].items():
        expected = goldens[name]
        if found.shape != expected.shape:
            part.note(name, f"{found.shape}, not {expected.shape}")
        elif found.dtype.kind == "f":
            part.note(name, float(np.abs(found - expected).max() / np.abs(expected).max()))
        else:
            differ = np.bitwise_count(found ^ expected) if found.dtype == np.uint8 else found != expected
            part.note(name, [found.size * (8 if found.dtype == np.uint8 else 1), int(differ.sum())])
    for precision in args.products:
        set_precision(precision)
        for name, step in STEPS.items():
            here = step(run, jax.devices()[0])
            leaves = [goldens[f"{name} {i}"] for i in range(len(jax.tree.leaves(here)))]
            part.note(f"{name}, {precision}", compare_steps(here, jax.tree.unflatten(jax.tree.structure(here), leaves)))


def compare_with_run(part: Part, args: argparse.Namespace) -> None:
    """Compare a run's sweep, latents and training steps on this device with the CPU's."""
    run, stored = load_run(args.run), to_arrays(read_sweep(Path(args.run) / "sweep.nc"))
    names = run.config.steer.strategies[: 1 if part.small else None]
    part.note("run", {"dtype": run.config.model.dtype, "strategies": " ".join(names)})
    part.note("sweep", compare_sweeps(run, stored, names))
    device, host = jax.devices()[0], jax.devices("cpu")[0]
    references, active_NF = {name: step(run, host) for name, step in STEPS.items()}, active_latents(run, host)
    differ_N = (active_latents(run, device) != active_NF).any(axis=-1)
    part.note("rows of other latents", [differ_N.size, int(differ_N.sum())])
    for precision in args.products:
        set_precision(precision)
        for name, step in STEPS.items():
            part.note(f"run's {name}, {precision}", compare_steps(step(run, device), references[name]))


def compare_sweeps(run: Run, stored: Arrays, names: tuple[str, ...]) -> dict[str, Any]:
    """Sweep here and compare with the stored sweep: name -> [how many are compared, how many differ]."""
    strategies = {name: find_strategy(name) for name in names}
    seconds, result = time_call(lambda: run_sweep(run, strategies))
    arrays = name_arrays(result)
    assert np.array_equal(arrays["alphas"], stored["alphas"]), "the config is not the one that the sweep was made with"
    counts: dict[str, Any] = {"seconds": round(seconds, 2)}

    def compare(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        compared, differing = counts.get(name, (0, 0))
        counts[name] = [compared + a.size, differing + int((a != b).sum())]
        return a != b

    for split in ("validation", "test"):
        count, heads = len(arrays[f"{split}_labels"]), run.config.model.heads
        for name in ("right", "gates"):
            pair = [unpack_bits(sweep[f"{split}_{name}"][: len(names)], count) for sweep in (arrays, stored)]
            differ = compare(f"steered {name}", *pair)
        pair = [pattern_to_gates(sweep[f"{split}_pattern"], heads) for sweep in (arrays, stored)]
        compare("unsteered gates", *pair)
        for field in ("prediction", "table"):
            compare(f"unsteered {field}", arrays[f"{split}_{field}"], stored[f"{split}_{field}"])
    chosen = [np.sort(sweep["latents"][: len(names)], axis=-1) for sweep in (arrays, stored)]
    alike_GSC = ~compare("latents chosen", *chosen).any(axis=-1)
    return counts | logits_of_differing_gates(run, arrays, stored, differ, alike_GSC)


def logits_of_differing_gates(
    run: Run, arrays: Arrays, stored: Arrays, differ: np.ndarray, alike_GSC: np.ndarray
) -> dict[str, Any]:
    """Compute the logits of gates that differ though the same latents were steered.

    If only rounding decides them, the largest is far below the largest logit of all.

    Args:
      differ: [G, S, Y, A, H, N] the test split's gates that differ.
      alike_GSC: where both sweeps chose the same latents.
    """
    config, trained, split = run.config, run.trained, run.dataset.test
    table = fill_table(compile_table_program(trained, split), trained.params, split, "test")
    class_YN = np.stack([arrays["test_labels"], arrays["test_prediction"]])
    same_YN = class_YN == np.stack([stored["test_labels"], stored["test_prediction"]])
    counted = differ & (alike_GSC[:, :, class_YN] & same_YN)[:, :, :, None, None, :]
    figures = {"largest logit": float(np.abs(table.gate_logits).max()), "differing, latents alike": int(counted.sum())}

    @jax.jit
    def logits(params: Any, steering: Steering, x_BD: jax.Array, class_B: jax.Array, alpha_B: jax.Array) -> jax.Array:
        steered_BD = apply_steering(steering, x_BD, class_B, alpha_B, config.steer)
        return trained.model.apply(params, steered_BD, config.sae_layer, method="gate_logits")

    places, sizes = np.argwhere(counted), [np.zeros(0)]
    places = places[:: len(places) // 20_000 + 1]
    for g, seed in np.unique(places[:, :2], axis=0):
        subset, sae = places[(places[:, :2] == (g, seed)).all(axis=1)], run.autoencoder(int(seed))
        z_NF = encode_split(sae, run.x_train)
        strength = (z_NF.sum(axis=0) / np.maximum((z_NF > 0).sum(axis=0), 1)).astype(np.float32)
        steering = Steering(sae, strength, Choice(arrays["latents"][g, seed], arrays["weights"][g, seed]))
        for rows in padded_chunks(0, len(subset), 1024):
            _, _, y, a, head, n = subset[rows].T
            alphas = arrays["alphas"][a].astype(np.float32)
            m_BH = logits(trained.params, steering, table.x[n], class_YN[y, n], alphas)
            sizes.append(np.abs(np.asarray(m_BH)[np.arange(len(rows)), head]))
    quantiles = np.quantile(np.concatenate(sizes), (0.5, 1.0)).tolist() if len(places) else (0.0, 0.0)
    return figures | dict(zip(("median logit of those", "largest logit of those"), quantiles, strict=True))


def active_latents(run: Run, device: jax.Device) -> np.ndarray:
    """Find where the first autoencoder's latents are active on the training residuals, on a device: [N, F] bool."""
    sae, x_ND = jax.device_put((run.autoencoder(0), run.x_train), device)
    return encode_split(sae, x_ND) > 0


Step = tuple[Any, Any, dict[str, float]]  # parameters before and after, and metrics


def vit_step(run: Run, device: jax.Device) -> Step:
    """Take the first step of the gated phase; without warm-up, whose first learning rate is 0."""
    config, plan = run.config, run.config.train.gated.model_copy(update={"warmup": 0.0})
    config = change_sections(config, train={"gated": plan})
    first, train = np.arange(config.train.batch), run.dataset.train
    before = jax.tree.map(np.array, init_state(run.trained.params, "gated", config))
    inputs = before, make_schedule(plan).cut(0, 1), gather_images(train.images, first)[None], train.labels[first][None]
    after, metrics = make_training_steps(run.trained.model, config, True)(*jax.device_put(inputs, device))
    numbers = {name: float(metrics[name][0]) for name in ("loss", "gradient_norm")}
    return before.params, jax.device_get(after.params), numbers


def sae_step(run: Run, device: jax.Device) -> Step:
    """Take the first step of the run's autoencoders."""
    c, D, F = run.config.sae, run.config.model.width, run.config.latents
    mesh = Mesh(np.array([[device]]), ("member", "data"), axis_types=(AxisType.Auto,) * 2)
    members = sae_train.seed_members(c)
    u_BD, count = np.asarray(scale_input(run.autoencoders.scaling, run.x_train[: c.batch])), len(members.k)
    state = sae_train.init_state(c, members, jnp.asarray(u_BD), F, run.config.seed)
    before = sae_train.state_to_checkpoint(state, count)
    epoch = sae_train.make_epoch_program(c, members, D, 1, run.config.seed, mesh)
    state = sae_train.state_from_checkpoint(before, count, mesh)
    after, curves = epoch(state, place(u_BD, replicated_sharding(mesh)))
    return before.sae, jax.device_get(after.sae), {"mse": float(np.mean(jax.device_get(curves["mse"])))}


STEPS: dict[str, Callable[[Run, jax.Device], Step]] = {"sae_step": sae_step, "vit_step": vit_step}


def compare_steps(step: Step, reference: Step) -> dict[str, float]:
    """Compare a training step with a reference.

    Adam's first step is nearly the gradient's sign: where a gradient is only rounding, it may have either sign.

    Returns:
      The largest difference of a parameter over the largest of its array; that of the step, by norms; and the relative
      difference of each metric.
    """
    before, after, expected = (jax.tree.leaves(tree) for tree in (reference[0], step[1], reference[1]))
    largest = max(np.abs(a - e).max() / max(np.abs(e).max(), 1e-30) for a, e in zip(after, expected, strict=True))

    def distance(a: list[Any], b: list[Any]) -> float:
        return sum(np.sum((x.astype(np.float64) - y) ** 2) for x, y in zip(a, b, strict=True)) ** 0.5

    figures = {"parameters": float(largest), "step": float(distance(after, expected) / distance(expected, before))}
    return figures | {name: abs(value / reference[2][name] - 1) for name, value in step[2].items()}


def training_speed(part: Part, args: argparse.Namespace) -> None:
    """Measure images a second and MFU; the programs are compiled side by side beforehand."""
    steps = 2 if part.small else 10
    cases = [(*shape, gated) for gated in (True, False) for shape in SHAPES]
    cases = [(side, patch, 4, gated) for side, patch, _, gated in cases[1:4]] if part.small else cases

    def config_of(side: int, patch: int, batch: int) -> Config:
        config = our_config("S", patch, batch, "bfloat16")
        return change_sections(config, data={"image_size": side}, model={"depth": 2} if part.small else {})

    def state_of(config: Config) -> Any:
        """Compute the shapes of a training state, for which nothing is compiled."""
        side, model = config.data.image_size, build_model(config, CLASSES)
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, side, side, 3))))
        return jax.eval_shape(lambda params: init_state(params, "gated", config), params)

    def compile_steps(side: int, patch: int, batch: int, gated: bool) -> Any:
        config, shape = config_of(side, patch, batch), (steps, batch)
        images, labels = jax.ShapeDtypeStruct((*shape, side, side, 3), np.uint8), jax.ShapeDtypeStruct(shape, np.int32)
        program = make_training_steps(build_model(config, CLASSES), config, gated)
        return program.lower(
            state_of(config), make_schedule(config.train.gated).cut(0, steps), images, labels
        ).compile()

    pool = concurrent.futures.ThreadPoolExecutor(min(6, os.cpu_count() or 1))
    programs = {case: pool.submit(compile_steps, *case) for case in cases}
    concurrent.futures.wait(programs.values(), timeout=0.7 * SECONDS[2])
    pool.shutdown(wait=False, cancel_futures=True)
    part.note(
        "compile_s", {"programs": sum(program.done() for program in programs.values()), "all": round(part.seconds(), 1)}
    )
    for (side, patch, batch, gated), program in programs.items():
        row: dict[str, Any] = {"tokens": 1 + (side // patch) ** 2, "batch": batch, "step": ("dense", "gated")[gated]}
        try:
            config = config_of(side, patch, batch)
            row |= speed_of(program.result(timeout=0), config, steps, state_of(config).params)
        except Exception as error:  # for instance out of memory: the other sizes go on
            row["error"] = repr(error)[:600]
        part.note("rows", row)


def speed_of(program: Any, config: Config, steps: int, params: Any) -> dict[str, Any]:
    """Measure one compiled program; `params` are shapes."""
    side, batch = config.data.image_size, config.train.batch
    images = jax.random.bits(jax.random.key(1), (steps, batch, side, side, 3), np.uint8)
    labels = jax.random.randint(jax.random.key(2), (steps, batch), 0, CLASSES, np.int32)
    params = jax.tree.map(lambda leaf: np.random.default_rng(0).normal(0, 0.05, leaf.shape).astype(np.float32), params)
    state = [jax.device_put(init_state(params, "gated", config))]
    schedule = make_schedule(config.train.gated).cut(0, steps)

    def call() -> Any:
        state[0], metrics = program(state[0], schedule, images, labels)
        return metrics

    jax.block_until_ready(call())
    seconds = median_seconds(call, 5) / steps
    flops, peak = 3 * 2 * count_open_macs(config, CLASSES), peak_tflops(config, jax.devices()[0])
    tflops = flops * batch / seconds / 1e12
    figures = {"images_per_second": round(batch / seconds, 1), "step_ms": round(1e3 * seconds, 2), "tflops": tflops}
    figures["temporaries_mib"] = program.memory_analysis().temp_size_in_bytes // 2**20
    return figures | ({"mfu": round(tflops / peak, 4)} if peak else {})


def autoencoders(part: Part, args: argparse.Namespace) -> None:
    """Train four autoencoders on residuals of low rank with noise, timed from the call to the saved checkpoint."""
    count, width, epochs = (2048, 96, 2) if part.small else (45_000, 384, 100)
    rng = np.random.default_rng(0)
    factors = rng.standard_exponential((count, 64), np.float32) * (rng.random((count, 64)) < 0.15)
    x_ND = factors @ rng.standard_normal((64, width), np.float32) + rng.standard_normal((count, width), np.float32) / 2
    sae = SAEConfig(expansion=8, k=32, epochs=epochs, seeds=4, control=False)
    config = Config(model=ModelConfig(width=width, heads=6), sae=sae)

    def train() -> sae_train.TrainedMembers:
        with tempfile.TemporaryDirectory() as directory:
            members, source = sae_train.seed_members(sae), ResidualsInMemory(x_ND)
            return sae_train.train_members(config, members, source, Path(directory))

    part.note("plan", {"residuals": count, "width": width, "latents": config.latents, "epochs": epochs, "members": 4})
    first, trained = time_call(train)
    part.note("first_s", round(first, 2))
    part.note("at_the_end", {name: round(float(curve[-1].mean()), 4) for name, curve in trained.curves.items()})
    if part.early(0.6):  # the program now comes from the compilation cache, as in a second run
        part.note("warm_s", round(time_call(train)[0], 2))
        part.note("vectors_per_second", round(4 * count * epochs / part.figures["warm_s"]))


def sweeps(part: Part, args: argparse.Namespace) -> None:
    """Sweep with each kind of arithmetic; those that matter most come first."""
    for products in ("exact",) if part.small else ("exact", "bfloat16", "float32"):
        if "rows" in part.figures and not part.early(0.65):
            break
        row: dict[str, Any] = {"products": products}
        try:
            measure_sweep(generate_run(products, part.small), row, part.small)
        except Exception as error:
            row["error"] = repr(error)[:600]
        part.note("rows", row)


def sweep_config(dtype: str, small: bool) -> Config:
    """Make the config of the ViT-S that is swept; `dtype` is that of training."""
    return change_sections(
        our_config("S", 8 if small else 4, 128, dtype), model={"depth": 2} if small else {}, gate={"bias": 0.0},
        sae={"seeds": 1, "control": False}, machine={"sweep_chunk": 100 if small else 1000},
    )  # fmt: skip


def generate_run(products: str, small: bool, config: Config | None = None) -> Run:
    """Build a ViT-S that was never trained, whose gates and answers differ from image to image all the same.

    Args:
      products: exact, as in every sweep; or as training with float32 or bfloat16 computes them.
      small: few layers, images and classes.
      config: instead of that of a ViT-S.
    """
    exact = products == "exact"
    config = config or sweep_config("float32" if exact else products, small)
    rng, classes = np.random.default_rng(0), 10 if small else CLASSES
    patterns = rng.normal(128, 50, (classes, 4, 4, 3))

    def split(per_class: int) -> Split:
        labels = np.tile(np.arange(classes), per_class).astype(np.int32)
        coarse = patterns[labels] + rng.normal(0, 30, (len(labels), 4, 4, 3))
        pixels = coarse.repeat(8, axis=1).repeat(8, axis=2) + rng.integers(-40, 40, (len(labels), 32, 32, 3))
        return Split(np.clip(pixels, 0, 255).astype(np.uint8), labels)

    dataset = Dataset(split(40), split(10), split(20 if small else 100), tuple(map(str, range(classes))))
    model = build_model(config, classes)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    head, gate = params["params"]["head"], params["params"][f"layers_{config.sae_layer}"]["decide"]["linear"]
    head["kernel"], gate["kernel"] = 25 * head["kernel"], 10 * gate["kernel"]
    residuals = jax.jit(
        lambda params, images: model.apply(params, preprocess(images, config.data), config.sae_layer, method="before")
    )
    x_ND = np.asarray(residuals(params, dataset.train.images)[:, 0])
    scaling = fit_scaling(ResidualsInMemory(x_ND).chunks, config.sae)
    weights = init_weights(jax.random.key(1), scale_input(scaling, x_ND), config.sae, config.latents)
    seeds = Autoencoder(jax.tree.map(lambda leaf: leaf[None], weights), scaling, config.sae.inference_k)
    # in its plain form, which can be cut at a layer
    model = model if exact else training_form(model, config, jax.devices("cpu")[:1])
    unnamed = np.zeros((config.latents, 0), np.int32)  # no class names a latent that was never trained
    return Run(TrainedModel(config, model, params), dataset, seeds, x_ND, unnamed)


def measure_sweep(run: Run, row: dict[str, Any], small: bool) -> None:
    """Measure a plain pass, a sweep and the suffix, and count where the three methods differ."""
    bench = sweep_benchmark.Bench(run, memory=1024 if small else 8192)
    config, split, alphas = bench.config, bench.split, sweep_benchmark.alpha_grid(41)
    count, batch, repeats = len(split.labels), config.machine.sweep_chunk, 2 if small else 3
    model, params = run.trained.model, run.trained.params
    unsteered = jax.jit(lambda p, images: jnp.argmax(model.apply(p, preprocess(images, config.data))[0], axis=-1))

    def plain_pass() -> Any:
        return jax.device_get([unsteered(params, split.images[i]) for i in padded_chunks(0, count, batch)])

    plain_pass()
    settings = len(bench.steered) * len(alphas)
    row |= {"images": count, "settings": settings, "plain_s": median_seconds(plain_pass, repeats)}
    job = bench.job(split, bench.table(split))
    bench.look_up(job, alphas)
    row["table_s"] = median_seconds(lambda: bench.table(split), repeats)
    row["look_ups_s"] = median_seconds(lambda: bench.look_up(job, alphas), 1 if small else 2)
    row["sweep_over_plain"] = (row["table_s"] + row["look_ups_s"]) / row["plain_s"]
    compare_methods(bench, Split(split.images[: batch * 2], split.labels[: batch * 2]), row)


def compare_methods(bench: sweep_benchmark.Bench, split: Split, row: dict[str, Any]) -> None:
    """Run one steering by the table, by plain passes and by the suffix; count the gates and answers that differ."""
    config, heads, count = bench.config, bench.config.model.heads, len(split.labels)
    steering, alphas = bench.steered[0], np.array([0.0, 1.0, 4.0])
    job = bench.job(split, bench.table(split))._replace(steered=[[steering]])
    _, _, (tally, _), _ = next(sweep_by_flips(job, alphas, bench.gates, bench.effects, bench.classes))
    gates_ANH = np.moveaxis(unpack_bits(tally.gates, count), 1, 2)
    pattern_AN = gates_ANH @ (1 << np.arange(heads))
    results = {"table": (gates_ANH, job.table.answers[np.arange(count), pattern_AN])}

    forward, batch = sweep_benchmark.plain_forward(bench.trained), config.machine.sweep_chunk
    passes = [sweep_benchmark.steer_split(forward, bench.params, split, batch, steering, alpha) for alpha in alphas]
    pattern_AN, answers_AN = (np.stack(arrays) for arrays in zip(*passes, strict=True))
    results["plain"] = pattern_to_gates(pattern_AN, heads), answers_AN

    settings = [SuffixSetting({config.sae_layer: steering}, split.labels)]
    row["suffix_first_s"], _ = time_call(lambda: run_suffix(bench.trained, split, settings, alphas, "suffix"))
    row["suffix_s"], suffix = time_call(lambda: run_suffix(bench.trained, split, settings, alphas, "suffix"))
    results["suffix"] = suffix.gates[config.sae_layer]["heads"][0], suffix.predictions[0]
    row |= {name: round(value, 4) for name, value in row.items() if isinstance(value, float)}
    row |= {"suffix_images_x_alphas": count * len(alphas), "gates_compared": int(gates_ANH.size)}
    for a, b in (("table", "plain"), ("suffix", "plain"), ("suffix", "table")):
        differing = (int((x != y).sum()) for x, y in zip(results[a], results[b], strict=True))
        row[f"{a}, {b} differ"] = dict(zip(("gates", "answers"), differing, strict=True))
    row["steered answers"] = int((answers_AN[0] != answers_AN[-1]).sum())  # 0 would mean that nothing could differ


def markdown(results: dict[str, Any]) -> str:
    """Format every figure in Markdown tables: `rows` row by row, all else by name."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        if isinstance(value, dict):
            return ", ".join(f"{name} {cell(item)}" for name, item in value.items())
        return f"{value[1]:,} of {value[0]:,}" if isinstance(value, list) and len(value) == 2 else str(value)

    def table(rows: list[list[str]]) -> list[str]:
        return ["| " + " | ".join(line) + " |" for line in (rows[0], ["---"] * len(rows[0]), *rows[1:])] + [""]

    def pairs(figures: dict[str, Any], without: str) -> list[str]:
        return table([["", ""], *([name, cell(value)] for name, value in figures.items() if name != without)])

    lines = ["# An accelerator, measured", "", *pairs(results, "parts")]
    for number, figures in results["parts"].items():
        lines += [f"## {number}: {PARTS[number].__name__}", "", *pairs(figures, "rows")]
        if rows := figures.get("rows"):
            names = list(dict.fromkeys(name for row in rows for name in row))
            lines += table([names, *([cell(row.get(name, "")) for name in names] for row in rows)])
    return "\n".join(lines)


def skipping(part: Part, args: argparse.Namespace) -> None:
    """Measure a pass that skips what gates drop against one that masks it, and against the dense model."""
    sizes = ((32, 8, 4),) if part.small else ((32, 4, 256), (224, 16, 64))
    for side, patch, batch in sizes:
        if "rows" in part.figures and not part.early():
            break
        row: dict[str, Any] = {"tokens": 1 + (side // patch) ** 2, "batch": batch}
        try:
            row |= measure_skipping(side, patch, batch, part.small)
        except Exception as error:  # for instance out of memory: the other sizes go on
            row["error"] = repr(error)[:600]
        part.note("rows", row)


def measure_skipping(side: int, patch: int, batch: int, small: bool) -> dict[str, Any]:
    """Measure one size on generated images; the gates of each layer drop the half of its patches of lowest logits."""
    config = change_sections(our_config("S", patch, batch, "float32"), data={"image_size": side})
    gate = config.gate.model_copy(update={"kinds": ("tokens",)})
    config = change_sections(config, model={"depth": 2} if small else {}).model_copy(update={"gate": gate})
    model, rng = build_model(config, CLASSES), np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((batch, side, side, 3)), jnp.float32)
    params = jax.tree.map(np.array, jax.jit(model.init)(jax.random.key(0), images[:1]))

    def compile_pass(gating: str) -> Any:
        forward = jax.jit(lambda params, images: model.apply(params, images, gating=gating))
        return forward.lower(params, images).compile()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        dense, masked = pool.map(compile_pass, ("dense", "thresholded"))
    for layer in range(gate.settings("tokens").first_layer, config.model.depth):  # each layer reads the earlier ones
        linear = params["params"][f"layers_{layer}"]["decide_tokens"]["linear"]
        linear["kernel"] = rng.standard_normal(linear["kernel"].shape).astype(np.float32)
        linear["bias"] -= np.median(masked(params, images)[1]["gate_logits"][layer]["tokens"]).astype(np.float32)
    params = jax.device_put(params)
    passes = {"dense": dense, "masked": masked, "skipping": make_skipping_forward(model)}
    row: dict[str, Any] = {}
    found = {}
    for name, run in passes.items():
        row[f"{name}_first_s"], found[name] = time_call(lambda run=run: run(params, images))
        seconds = median_seconds(lambda run=run: run(params, images), 2 if small else 10)
        row[f"{name}_images_per_second"] = round(batch / seconds, 1)
    masked, skipped = found["masked"], found["skipping"]
    gates = [stack_gates(out["gates"], "tokens") > 0 for _, out in (masked, skipped)]
    row["kept"] = float(gates[0].mean())
    row["differing gates"] = [gates[0].size, int((gates[0] != gates[1]).sum())]
    differing = jnp.argmax(masked[0], axis=-1) != jnp.argmax(skipped[0], axis=-1)
    return row | {"differing answers": [batch, int(differing.sum())]}


PARTS = {1: correctness, 2: training_speed, 3: autoencoders, 4: sweeps, 5: skipping}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="", help="a finished run that a CPU made, for part 1")
    parser.add_argument("--write-goldens", type=Path, help="write the goldens of part 1 to this file, and nothing else")
    parser.add_argument("--goldens", type=Path, help="goldens of part 1 that were written before")
    parser.add_argument("--out", type=Path, default=Path(), help="a directory for the results")
    parser.add_argument("--fast", action="store_true", help="let GPUs use kernels that add in any order")
    parser.add_argument("--parts", type=lambda text: [int(n) for n in text.split(",")], default=list(PARTS))
    parser.add_argument("--products", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="of float32, in part 1")
    parser.add_argument("--small", action="store_true", help="everything in a minute or two on a CPU")
    args = parser.parse_args()
    if args.fast:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISM[0]}=false".strip()
    request_determinism()
    if args.write_goldens:
        write_goldens(args.write_goldens, args.small)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="headsteer-compiled-"))
    device = jax.devices()[0]
    results: dict[str, Any] = {
        "benchmark": "accelerator", "device": device.device_kind, "platform": device.platform,
        "devices": jax.device_count(), "jax": jax.__version__, "python": sys.version.split()[0],
        "xla_flags": os.environ.get("XLA_FLAGS", ""), "cores": os.cpu_count(), "small": args.small, "parts": {},
    }  # fmt: skip
    print(json.dumps(results), flush=True)
    for number in args.parts:
        part = Part(number, args.small)
        results["parts"][number] = part.figures
        set_precision("default")
        try:
            if time.perf_counter() - BEGAN > LATE:
                raise TimeoutError("no time was left")
            PARTS[number](part, args)
        except (Exception, KeyboardInterrupt) as error:  # the next part goes on
            part.note("error", repr(error)[:600])
        part.note("seconds", round(part.seconds(), 1))
        results["seconds"] = round(time.perf_counter() - BEGAN, 1)
        (args.out / "results.json").write_text(json.dumps(results, indent=1))
        (args.out / "results.md").write_text(markdown(results))
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
