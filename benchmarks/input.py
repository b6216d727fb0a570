"""Measures the input pipeline against the training step that consumes it: images a second of each.

    python benchmarks/input.py [--images=1024] [--repeats=3] [--device-rate=0]

Generated photographs (smooth noise, JPEG quality 90) are read as training reads them: from memory, or from 32x32 and
224x224 JPEGs in a folder, which threads decode batch by batch and send to the devices ahead. The step is the gated
ViT-S's at 17 tokens (32x32) and at 197 (224x224, patch 16), on batches that are on the device already. --device-rate
is the number of images a second that your own accelerator trains; a column then says how many cores can decode for it.
The last line is one JSON object.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import jax
import numpy as np
from PIL import Image

from headsteer_jax.config import Config, DataConfig, MachineConfig, ModelConfig, PhaseConfig, TrainConfig
from headsteer_jax.data import batches
from headsteer_jax.data.dataset import LazyImages
from headsteer_jax.data.sources import load_dataset
from headsteer_jax.model.vit import build_model
from headsteer_jax.runtime import mesh
from headsteer_jax.train import loop, step

CLASSES = 10


def make_folder(root: Path, side: int, images: int) -> None:
    """Write <root>/{train,test}/<class>/*.jpg: smooth noise, which takes about as many bytes as a photograph."""
    rng = np.random.default_rng(0)
    for split, count in (("train", images), ("test", 2 * CLASSES)):
        for number in range(count):
            directory = root / split / f"{number % CLASSES:02d}"
            directory.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
            picture = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), np.int16)
            noisy = np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(directory / f"{number:05d}.jpg", quality=90)


def make_config(root: Path, side: int, patch: int, batch: int, in_memory: bool) -> Config:
    data = DataConfig(
        source="folder", path=str(root), image_size=side, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3,
        crop_padding=side // 8, flip=True,
    )  # fmt: skip
    step = PhaseConfig(steps=100_000)
    plan = TrainConfig(batch=batch, dense=step, gated=step, steps_per_call=1, eval_every=1000)
    machine = MachineConfig(image_memory=4096 if in_memory else 1)  # what is larger is decoded as it comes
    return Config(data=data, model=ModelConfig.of_size("S", patch=patch), train=plan, machine=machine)


def input_rate(config: Config, repeats: int) -> tuple[float, bool]:
    """Measure the images a second that reach the device, and say whether they are decoded as they come."""
    split = load_dataset(config.data, 0, config.machine.image_memory).train
    devices = mesh.training_mesh(config.machine)
    calls = max(4, len(split.labels) // config.train.batch)
    rates = []
    for repeat in range(repeats):
        stream = batches.device_batches(split, config, devices, [(n, n + 1) for n in range(calls)], repeat * calls)
        began = time.perf_counter()
        for images, _ in stream:
            images.block_until_ready()
        rates.append(calls * config.train.batch / (time.perf_counter() - began))
    return median(rates), isinstance(split.images, LazyImages)


def step_rate(config: Config, repeats: int) -> float:
    """Measure the images a second of the gated training step."""
    model = build_model(config, CLASSES)
    params = loop.init_params(model, config, 0)
    devices = mesh.training_mesh(config.machine)
    state = loop.init_state(params, "gated", config)
    shardings = mesh.state_shardings(state, devices)
    state = mesh.place(state, shardings)
    run = step.make_training_steps(model, config, True, shardings)
    side, batch = config.data.image_size, config.train.batch
    images = np.random.default_rng(0).integers(0, 256, (1, batch, side, side, 3), dtype=np.uint8)
    batches_on_device = jax.device_put((images, np.zeros((1, batch), np.int32)), mesh.batch_sharding(devices, axis=1))
    schedule, seconds = step.make_schedule(config.train.gated).cut(0, 1), []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(run(state, schedule, *batches_on_device))
        seconds.append(time.perf_counter() - began)
    return batch / median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024, help="in each folder (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="times are medians over these (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs=2, default=(128, 16), help="at 32 and at 224 pixels")
    parser.add_argument("--device-rate", type=float, default=0.0, help="images a second of your accelerator")
    flags = parser.parse_args()
    rows, cores = [], os.cpu_count() or 1
    for side, patch, batch in ((32, 8, flags.batch[0]), (224, 16, flags.batch[1])):
        with tempfile.TemporaryDirectory() as directory:
            make_folder(Path(directory), side, flags.images)
            step = step_rate(make_config(Path(directory), side, patch, batch, in_memory=True), flags.repeats)
            for in_memory in (True, False):
                rate, lazy = input_rate(make_config(Path(directory), side, patch, batch, in_memory), flags.repeats)
                assert lazy != in_memory, (
                    f"{side} pixels: --images={flags.images} are too few to be decoded as they come"
                )
                row = {"pixels": side, "from": "memory" if in_memory else "JPEG", "input": rate, "step": step}
                row |= {"ratio": rate / step, "per_core": rate / cores}
                if flags.device_rate and not in_memory:
                    row["cores_for_device_rate"] = 3 * flags.device_rate / row["per_core"]
                rows.append(row)
                print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    print(json.dumps({"benchmark": "input", "cores": cores, "device": jax.devices()[0].device_kind, "rows": rows}))


if __name__ == "__main__":
    main()
