"""Measures smaller models for ten classes of a run: images a second and accuracy, against the dense model.

    python benchmarks/specialise.py RUN [--budget=0.43] [--steps=200] [--sets=10] [--batch=64] [--rounds=15]
        [--rows=FILE.jsonl] [--part=1/2]

Half of the sets are drawn at random; the others begin with classes that the dataset relates, such as superclasses, and
are filled up with those whose classifier weights are nearest. Each set gets one model cut to the budget, which is
measured as it is (`refitted`) and after --steps steps of distillation (`distilled`). The dense model, restricted to the
same classes, is the baseline: it is the run's own forward pass, as evaluation runs it.

First every model is made and scored, on test images that are used once for each model. Then the speed of all of them is
measured, on models of the same sizes, because a model's speed depends on its sizes alone. `speedup` is the ratio of
medians of interleaved rounds, by the clock; `speedup_cpu` is the same by the CPU time of this process, which other
programs on the machine disturb less. `ceiling` is what the multiply-accumulates allow, and `share_of_gain` is
(speedup - 1) / (ceiling - 1). The last line is one JSON object with a row for each set.

With --rows every model's row is also added to a file, and a set that has a row there is not made again, so that the
same command continues where it was stopped. --part=1/2 makes every second set only, from the first, and
measures no speed: two such commands can run beside each other, each on a core of its own, before the one that ends the
work.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from headsteer_jax.cli import _start
from headsteer_jax.data.dataset import gather_images
from headsteer_jax.deploy.build import Sources, make_deployed_function, make_vit_function, propose_heads
from headsteer_jax.deploy.card import compare_answers
from headsteer_jax.deploy.convert import KeptParts, cut_model
from headsteer_jax.deploy.cost import count_macs, count_parameters
from headsteer_jax.deploy.distil import distil_model
from headsteer_jax.deploy.images import answer_images, select_images
from headsteer_jax.deploy.specialise import Goal, specialise
from headsteer_jax.deployment import load_sources
from headsteer_jax.runs import check_done, load_run_dataset, locate_run, read_config

SET = 10  # classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--budget", type=float, default=0.43)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sets", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--part", default="", help="such as 1/2, the first of two halves of the sets")
    flags = parser.parse_args()
    workdir = locate_run(flags.run, "RUN")
    config = read_config(workdir)
    check_done(config, workdir, "train", "benchmarks/specialise.py")
    _start()
    config, dataset = load_run_dataset(config, workdir, None, "")
    sources = load_sources(config, dataset, workdir, np.arange(len(dataset.class_names)))
    rows: list[dict[str, Any]] = []
    if flags.rows is not None and flags.rows.exists():
        by_set = {row["set"]: row for row in map(json.loads, flags.rows.read_text().splitlines())}
        rows = [by_set[number] for number in sorted(by_set)]
    first, parts = (int(number) for number in (flags.part or "1/1").split("/"))
    sets, made = list_sets(sources, flags.sets), {row["set"] for row in rows}
    for number, (kind, labels) in enumerate(sets):
        if number in made or number % parts != first - 1:
            continue
        rows.append({"set": number, "kind": kind} | make_set(sources._replace(labels=labels), flags))
        line = json.dumps(rows[-1])
        print(line, flush=True)
        if flags.rows is not None:
            with flags.rows.open("a") as file:
                file.write(line + "\n")
    if not flags.part:
        rows = [row | time_set(sources._replace(labels=sets[row["set"]][1]), row, flags) for row in rows]
        print(json.dumps({"device": jax.devices()[0].device_kind, **summarise_rows(rows), "rows": rows}))


def list_sets(sources: Sources, count: int) -> list[tuple[str, np.ndarray]]:
    """List sets of SET classes: the first half at random, the others of related classes."""
    rng, classes = np.random.default_rng(0), len(sources.dataset.class_names)
    sets = [("random", np.sort(rng.choice(classes, SET, replace=False))) for _ in range((count + 1) // 2)]
    kernel_DC = np.asarray(sources.dense.params["params"]["head"]["kernel"], np.float64)
    kernel_DC = kernel_DC - kernel_DC.mean(axis=1, keepdims=True)
    unit_DC = kernel_DC / np.linalg.norm(kernel_DC, axis=0)
    related = sources.dataset.related if sources.dataset.related is not None else np.zeros((classes, classes), bool)
    used: set[int] = set()
    for seed in np.argsort(-related.sum(axis=1), kind="stable"):
        if len(sets) < count and int(seed) not in used:
            members = [int(seed), *np.flatnonzero(related[seed]).tolist()][:SET]
            used |= set(members)
            while len(members) < SET:
                nearness_C = unit_DC[:, members].mean(axis=1) @ unit_DC
                nearness_C[members] = -np.inf
                members.append(int(np.argmax(nearness_C)))
            sets.append(("related", np.sort(members)))
    return sets


def make_set(sources: Sources, flags: argparse.Namespace) -> dict[str, Any]:
    """Cut a model for one set of classes, and score it without and with distillation."""
    images, dense, seed = select_images(sources.dataset, sources.labels), sources.convert(False), sources.config.seed
    begin = time.perf_counter()
    made = specialise(dense, images, Goal(flags.budget, 0.0), propose_heads(sources, images), seed)
    cut_seconds = time.perf_counter() - begin
    trained = distil_model(made.model, dense, images.train, flags.steps, sources.config)
    seconds = {"cutting": cut_seconds, "distilling": time.perf_counter() - begin - cut_seconds}
    whole = answer_images(dense, images.test, "dense")
    models = {"refitted": made.model, "distilled": trained}
    scores = {name: compare_answers(answer_images(model, images.test, name), whole) for name, model in models.items()}
    dense_score, share = scores["refitted"]["dense"], count_macs(made.model.config) / count_macs(dense.config)
    return {
        "classes": list(dense.config.classes),
        "share_of_macs": share, "ceiling": 1 / share,
        "share_of_parameters": count_parameters(made.model.params) / count_parameters(dense.params),
        "heads": made.model.config.heads, "neurons": made.model.config.neurons,
        "dense_accuracy": dense_score["accuracy"], "images": dense_score["images"],
        **{name: {key: score[key] for key in ("accuracy", "gained", "lost", "p")} for name, score in scores.items()},
        "seconds": seconds,
    }  # fmt: skip


def time_set(sources: Sources, row: dict[str, Any], flags: argparse.Namespace) -> dict[str, float]:
    """Measure the speed of a model of a row's sizes against the dense model."""
    dense, images = sources.convert(False), select_images(sources.dataset, sources.labels).test.images
    sizes = KeptParts(*(tuple(map(np.arange, row[name])) for name in ("heads", "neurons")))
    functions = {
        "dense": make_vit_function(sources.dense, sources.labels, "dense"),
        "cut": make_deployed_function(cut_model(dense, sizes)),
    }
    pixels = gather_images(images, np.arange(flags.batch) % len(images))
    speed = time_functions(functions, jax.device_put(pixels), flags.rounds)
    return speed | {"share_of_gain": (speed["speedup"] - 1) / (row["ceiling"] - 1)}


def time_functions(
    functions: dict[str, Callable[[jax.Array], Any]], images: jax.Array, rounds: int
) -> dict[str, float]:
    """Measure `speedup` and `speedup_cpu` of `cut` over `dense`, in turns."""
    clock: dict[str, list[float]] = {name: [] for name in functions}
    cpu: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            begin, begin_cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(function(images))
            if number:  # the first compiles
                clock[name].append(time.perf_counter() - begin)
                cpu[name].append(time.process_time() - begin_cpu)
    return {
        "images_per_second": len(images) / median(clock["cut"]),
        "speedup": median(clock["dense"]) / median(clock["cut"]),
        "speedup_cpu": median(cpu["dense"]) / median(cpu["cut"]),
    }


def summarise_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the sets: the speedups, the mean change of accuracy, and how many sets lost any."""
    summary: dict[str, Any] = {
        name: median(row[name] for row in rows) for name in ("speedup", "speedup_cpu", "share_of_gain")
    }
    summary["least_speedup"] = min(row["speedup"] for row in rows)
    for name in ("refitted", "distilled"):
        changes = [row[name]["accuracy"] - row["dense_accuracy"] for row in rows]
        summary[name] = {
            "change_of_accuracy": float(np.mean(changes)), "no_lower": sum(change >= 0 for change in changes),
            "significantly_lower": sum(c < 0 and row[name]["p"] < 0.05 for c, row in zip(changes, rows, strict=True)),
        }  # fmt: skip
    return summary


if __name__ == "__main__":
    main()
