"""Measures how much of what gates drop is saved in time: the skipping forward pass against the dense and masked models.

    python benchmarks/skip.py [--tokens=65,197] [--batches=1,64,256] [--gates=tokens,all,open] [--repeats=5] [--run=DIR]

The model is a ViT-S on generated images: 32x32 with 4x4 patches make 65 tokens, 224x224 with 16x16 patches make 197.
Its gates read the model's own residuals through random weights, and their biases are set so that the gates drop what a
row says, by different amounts from image to image:
- tokens: half of the patches;
- all: patches, sublayers and heads, so that the multiply-accumulates (MACs) are about half of the dense model's;
- open: gates of all kinds that drop nothing, which shows what deciding costs.
--run=DIR measures a finished run's gated model on images of its test split instead.

The dense, masked and skipping passes take turns, and times are medians without compilation. A row has the speedup over
the dense model, its ceiling (dense MACs / gated MACs), share_of_gain = (speedup - 1) / (ceiling - 1), masked (the
masked model's speedup), the predictions and gates that differ from the masked model's, the largest difference of a
logit over the largest logit, and the seconds of compiling. The last line printed is one JSON object.
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
from headsteer_jax.data.dataset import gather_images
from headsteer_jax.model.compute import count_image_macs
from headsteer_jax.model.macs import count_dense_macs
from headsteer_jax.model.skip import make_skipping_forward
from headsteer_jax.model.vit import TrainedModel, build_model, stack_gates
from headsteer_jax.runs import load_run

CLASSES = 100
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


def measure(what: str, trained: TrainedModel, images: jax.Array, repeats: int) -> dict[str, Any]:
    """Measure one row."""
    config, model, params = trained
    classes = model.classes
    dense = jax.jit(lambda params, x: model.apply(params, x, gating="dense")[0])
    masked = jax.jit(lambda params, x: model.apply(params, x, gating="thresholded"))
    skipping = make_skipping_forward(model)
    expected, out = masked(params, images)
    gates: dict[str, np.ndarray] = {kind: np.asarray(stack_gates(out["gates"], kind)) > 0 for kind in config.gate.kinds}
    calls = {"dense": dense, "masked": masked, "skipping": skipping}
    seconds, first = take_turns({name: lambda f=f: f(params, images) for name, f in calls.items()}, repeats)
    logits, found = skipping(params, images)
    differing = {kind: np.asarray(stack_gates(found["gates"], kind) > 0) != gates[kind] for kind in gates}
    ceiling = count_dense_macs(config, classes) / float(count_image_macs(config, classes, gates).mean())
    speedup = seconds["dense"] / seconds["skipping"]
    row = {"what": what, "tokens": 1 + (config.data.image_size // config.model.patch) ** 2, "batch": len(images)}
    row |= {"speedup": round(speedup, 3), "ceiling": round(ceiling, 3)}
    row["share_of_gain"] = round((speedup - 1) / (ceiling - 1), 3) if ceiling > 1.01 else None
    row["differing"] = int((jnp.argmax(logits, -1) != jnp.argmax(expected, -1)).sum())
    row["differing_gates"] = int(sum(d.sum() for d in differing.values()))
    row["logit_error"] = float(jnp.abs(logits - expected).max() / jnp.abs(expected).max())
    row |= {"masked": round(seconds["dense"] / seconds["masked"], 3), "dense_seconds": round(seconds["dense"], 4)}
    row["first_call_seconds"] = round(first["skipping"], 1)
    row["usage"] = {kind: round(float(g.mean()), 3) for kind, g in gates.items()}
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="65,197")
    parser.add_argument("--batches", default="1,64,256")
    parser.add_argument("--gates", default="tokens,all,open", help=f"of {', '.join(GATES)}")
    parser.add_argument("--size", default="S", help="of the ViT: Ti, S or B")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--run", type=Path, help="the workdir of a finished run")
    flags = parser.parse_args()
    batches = [int(batch) for batch in flags.batches.split(",")]
    rows = []
    if flags.run:
        run = load_run(flags.run)
        for batch in batches:
            test = gather_images(run.dataset.test.images, np.arange(min(batch, len(run.dataset.test.labels))))
            rows.append(measure("run", run.trained, preprocess(jnp.asarray(test), run.config.data), flags.repeats))
    else:
        for tokens in map(int, flags.tokens.split(",")):
            for name in flags.gates.split(","):
                trained = make_model(make_config(tokens, tuple(GATES[name]), flags.size), GATES[name])
                for batch in batches:
                    images = make_images(trained.config, batch)
                    rows.append(measure(name, trained, images, flags.repeats))
    print(json.dumps({"benchmark": "skip", "device": jax.devices()[0].device_kind, "rows": rows}))


if __name__ == "__main__":
    main()
