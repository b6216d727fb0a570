"""Measures how much of what gates drop is saved in time: the skipping forward pass against the dense and masked models.

    python benchmarks/skip.py [--tokens=65,197] [--batch=1,64,256] [--kinds=tokens,all,open] [--repeats=5]
    python benchmarks/skip.py --run=DIR [--batch=...] [--images=N]

The model is a ViT-S on generated images: 32x32 with 4x4 patches make 65 tokens, 224x224 with 16x16 patches make 197.
Its gates read the model's own residuals through random weights, and their biases are set so that the gates drop what a
row says, by different amounts from image to image:
- tokens: half of the patches;
- all: patches, sublayers and heads, so that the multiply-accumulates (MACs) are about half of the dense model's;
- open: gates of all kinds that drop nothing, which shows what deciding costs.
--run=DIR measures a trained run's gated model instead: one row for each batch of its test split, and one for the whole
split (or its first N images) from uint8 images to predictions, as evaluations pass over it (`make_observer`).

The dense and the skipping pass take turns, and times are medians without compilation. A row has the speedup over the
dense model, its ceiling (dense MACs / gated MACs), share_of_gain = (speedup - 1) / (ceiling - 1), the predictions and
gates that differ from the masked model's, how many of these gates have a logit beyond rounding of 0 (1e-5 of the mean
size of its kind's; must be 0), the largest difference of a logit over the largest logit, the seconds of the dense pass,
and those of the skipping pass's first call, which compiles. --masked times the masked model, too. The last line printed
is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.config import Config, DataConfig, GateConfig, ModelConfig
from headsteer_jax.config.schema import GATE_KINDS
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import Split, gather_images
from headsteer_jax.model.compute import count_image_macs
from headsteer_jax.model.macs import count_dense_macs
from headsteer_jax.model.passes import Observed, make_observer
from headsteer_jax.model.skip import make_skipping_forward
from headsteer_jax.model.vit import TrainedModel, build_model, stack_gates
from headsteer_jax.runs import load_run_dataset, read_config
from headsteer_jax.runtime.files import Workdir
from headsteer_jax.train.loop import load_trained

CLASSES = 100
ROUNDING = 1e-5  # of the mean size of the gate logits of a kind: a smaller logit may fall on either side of 0
IMAGES = {17: (32, 8), 65: (32, 4), 197: (224, 16)}  # tokens -> side of the image, side of a patch
# by the name of a row: the kinds of gates, and the share of gates of each kind that is closed
GATES: dict[str, dict[str, float]] = {
    "tokens": {"tokens": 0.5},
    "all": {"heads": 0.2, "sublayers": 0.2, "tokens": 0.4},
    "open": {"heads": 0.0, "sublayers": 0.0, "tokens": 0.0},
}


def make_config(tokens: int, kinds: tuple[str, ...], size: str) -> Config:
    """Make the config of a ViT on images that have this many tokens."""
    side, patch = IMAGES[tokens]
    data = DataConfig(image_size=side, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    gate = GateConfig(kinds=tuple(kind for kind in GATE_KINDS if kind in kinds))
    return Config(data=data, model=ModelConfig.of_size(size, patch=patch), gate=gate)


def make_images(config: Config, count: int) -> jax.Array:
    """Draw images whose contrast, and so whose patches, differ from image to image."""
    rng, side = np.random.default_rng(0), config.data.image_size
    noise = rng.standard_normal((count, side, side, 3)) * rng.uniform(0.3, 2, (count, 1, 1, 1))
    return jnp.asarray(noise + rng.standard_normal((count, 1, 1, 3)), jnp.float32)


def make_model(config: Config, closed: dict[str, float]) -> TrainedModel:
    """Make a model with random weights whose gates close these shares, measured layer by layer on other images."""
    model, rng = build_model(config, CLASSES), np.random.default_rng(1)
    images = make_images(config, 32)
    params = jax.tree.map(np.array, jax.jit(model.init)(jax.random.key(0), images[:1]))
    run = jax.jit(lambda params: model.apply(params, images, gating="thresholded")[1]["gate_logits"])
    for layer in range(config.model.depth):
        for kind in config.gate.kinds_in(layer):
            own = params["params"][f"layers_{layer}"]["decide" if kind == "heads" else f"decide_{kind}"]["linear"]
            own["kernel"] = rng.standard_normal(own["kernel"].shape).astype(np.float32)
    for layer in range(config.model.depth):
        for kind, m in run(params).get(layer, {}).items():
            own = params["params"][f"layers_{layer}"]["decide" if kind == "heads" else f"decide_{kind}"]["linear"]
            limit = np.quantile(m, closed[kind], axis=None if kind == "tokens" else 0)
            own["bias"] = (own["bias"] - limit + (0 if closed[kind] else 1e3)).astype(np.float32)
    return TrainedModel(config, model, jax.device_put(params))


def take_turns(calls: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Measure the median seconds of each call, which are made in turns, and the seconds of its first call."""
    first: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            seconds = time.perf_counter() - began
            if turn:
                times[name].append(seconds)
            else:
                first[name] = seconds
    return {name: float(np.median(values)) for name, values in times.items()}, first


def describe_row(
    what: str, trained: TrainedModel, images: int, seconds: dict[str, float], gates: Any
) -> dict[str, Any]:
    """Make a row of the seconds of the passes and of the masked model's gates."""
    config, classes = trained.config, trained.model.classes
    ceiling = count_dense_macs(config, classes) / float(count_image_macs(config, classes, gates).mean())
    speedup = seconds["dense"] / seconds["skipping"]
    row = {"what": what, "tokens": 1 + (config.data.image_size // config.model.patch) ** 2, "batch": images}
    row |= {"speedup": round(speedup, 3), "ceiling": round(ceiling, 3)}
    row["share_of_gain"] = round((speedup - 1) / (ceiling - 1), 3) if ceiling > 1.01 else None
    row["usage"] = {kind: round(float(g.mean()), 3) for kind, g in gates.items()}
    if "masked" in seconds:
        row["masked"] = round(seconds["dense"] / seconds["masked"], 3)
    return row | {"dense_seconds": round(seconds["dense"], 4)}


def compare_answers(
    config: Config, masked: tuple[jax.Array, dict[str, Any]], skipping: tuple[jax.Array, dict[str, Any]]
) -> dict[str, Any]:
    """Compare the logits and the gates of the two passes on the same images."""
    (expected, out), (logits, found) = masked, skipping
    row: dict[str, Any] = {"differing": int((jnp.argmax(logits, -1) != jnp.argmax(expected, -1)).sum())}
    row |= {"differing_gates": 0, "gates_beyond_rounding": 0}
    for kind in config.gate.kinds:
        differs = np.asarray((stack_gates(found["gates"], kind) > 0) != (stack_gates(out["gates"], kind) > 0))
        size = np.abs(np.asarray(stack_gates(out["gate_logits"], kind)))  # counted from the threshold
        row["differing_gates"] += int(differs.sum())
        row["gates_beyond_rounding"] += int((differs & (size > ROUNDING * size.mean())).sum())
    return row | {"logit_error": float(jnp.abs(logits - expected).max() / jnp.abs(expected).max())}


def compare_split(trained: TrainedModel, split: Split) -> dict[str, Any]:
    """Compare the two passes on every image of a split."""
    config, model, params = trained
    masked = jax.jit(lambda params, x: model.apply(params, x, gating="thresholded"))
    skipping, rows = make_skipping_forward(model), []
    count, size = len(split.labels), min(config.train.eval_batch, len(split.labels))
    for begin in [*range(0, count - size, size), count - size]:  # the last may overlap: one size, one program
        images = gather_images(split.images, np.arange(begin, begin + size))
        x = preprocess(jnp.asarray(images), config.data)
        rows.append(compare_answers(config, masked(params, x), skipping(params, x)))
    return {key: (max if key == "logit_error" else sum)(row[key] for row in rows) for key in rows[0]}


def measure(what: str, trained: TrainedModel, images: jax.Array, repeats: int, masked_too: bool) -> dict[str, Any]:
    """Measure one batch."""
    config, model, params = trained
    dense = jax.jit(lambda params, x: model.apply(params, x, gating="dense")[0])
    masked = jax.jit(lambda params, x: model.apply(params, x, gating="thresholded"))
    skipping = make_skipping_forward(model)
    expected, out = masked(params, images)
    gates = {kind: np.asarray(stack_gates(out["gates"], kind)) > 0 for kind in config.gate.kinds}
    calls = {"dense": dense, "skipping": skipping} | ({"masked": masked} if masked_too else {})
    seconds, first = take_turns({name: lambda f=f: f(params, images) for name, f in calls.items()}, repeats)
    row = describe_row(what, trained, len(images), seconds, gates)
    row |= compare_answers(config, (expected, out), skipping(params, images))
    row["first_call_seconds"] = round(first["skipping"], 1)
    print(json.dumps(row), flush=True)
    return row


def measure_split(trained: TrainedModel, split: Split, repeats: int) -> dict[str, Any]:
    """Measure passes over a split from uint8 images to predictions."""
    config, model, params = trained
    machine = {skip: config.machine.model_copy(update={"skip": skip}) for skip in ("always", "never")}
    configs = {skip: config.model_copy(update={"machine": own}) for skip, own in machine.items()}
    observers = {
        "dense": make_observer(model, configs["never"], "dense", config.model.depth - 1),
        "masked": make_observer(model, configs["never"], "thresholded", config.model.depth - 1),
        "skipping": make_observer(model, configs["always"], "thresholded", config.model.depth - 1),
    }
    seen: dict[str, Observed] = {}

    def observe(name: str) -> None:
        seen[name] = observers[name](params, split, name)

    observe("masked")
    seconds, _ = take_turns({name: lambda name=name: observe(name) for name in ("dense", "skipping")}, repeats)
    row = describe_row("run, test split", trained, config.train.eval_batch, seconds, seen["masked"].gates)
    row |= {"images": len(split.labels), "images_per_second": round(len(split.labels) / seconds["skipping"], 1)}
    row["accuracy"] = {name: round(observed.accuracy(split.labels), 4) for name, observed in seen.items()}
    row |= compare_split(trained, split)
    row["differing"] = int((seen["skipping"].prediction != seen["masked"].prediction).sum())
    print(json.dumps(row), flush=True)
    return row


def measure_run(directory: Path, batches: list[int], flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a run's gated model on its test split."""
    workdir = Workdir(directory)
    config, dataset = load_run_dataset(read_config(workdir), workdir, None, "--config.data.path of headsteer run")
    trained, test = load_trained(config, len(dataset.class_names), workdir / "train"), dataset.test
    rows = []
    for batch in batches:
        x = gather_images(test.images, np.arange(min(batch, len(test.labels))))
        rows.append(measure("run", trained, preprocess(jnp.asarray(x), config.data), flags.repeats, flags.masked))
    part = np.arange(min(flags.images or len(test.labels), len(test.labels)))
    split = Split(gather_images(test.images, part), test.labels[part])
    return [*rows, measure_split(trained, split, flags.repeats)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="65,197")
    parser.add_argument("--batch", default="1,64,256")
    parser.add_argument("--kinds", default="tokens,all,open", help=f"of {', '.join(GATES)}")
    parser.add_argument("--size", default="S", help="of the ViT: Ti, S or B")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--masked", action="store_true", help="time the masked model, too")
    parser.add_argument("--run", type=Path, help="the workdir of a run whose stage train is done")
    parser.add_argument("--images", type=int, default=0, help="of the run's test split; 0: all")
    flags = parser.parse_args()
    batches = [int(batch) for batch in flags.batch.split(",") if batch]
    rows = []
    if flags.run:
        rows = measure_run(flags.run, batches, flags)
    else:
        for tokens in map(int, flags.tokens.split(",")):
            for name in flags.kinds.split(","):
                trained = make_model(make_config(tokens, tuple(GATES[name]), flags.size), GATES[name])
                for batch in batches:
                    images = make_images(trained.config, batch)
                    rows.append(measure(name, trained, images, flags.repeats, flags.masked))
    print(json.dumps({"benchmark": "skip", "device": jax.devices()[0].device_kind, "rows": rows}))


if __name__ == "__main__":
    main()
