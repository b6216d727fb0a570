"""The figure of images a second is drawn from speed.json, whatever models are in it."""

import io

import numpy as np
from PIL import Image

from headsteer_jax.report.speed import draw_speed


def make_row(name: str, accuracy: float, share: float, speed: float) -> dict:
    interval = [accuracy - 0.02, accuracy + 0.01]
    speeds = {"1": speed / 8, "64": speed}
    return {"what": name, "accuracy": accuracy, "interval": interval, "images": 500, "share_of_macs": share,
            "images_per_second": speeds}  # fmt: skip


def test_every_model_has_its_point() -> None:
    rows = [make_row("dense", 0.9, 1.0, 400), make_row("gated, masked", 0.9, 0.6, 380)]
    few = draw_speed({"device": "cpu", "rows": rows})
    more = draw_speed({"device": "cpu", "rows": [*rows, make_row("specialised", 0.91, 0.4, 900)]})
    orange = [
        np.all(np.abs(np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), int) - (0xD5, 0x5E, 0)) < 30, axis=2).sum()
        for png in (few, more)
    ]
    assert orange[0] == 0
    assert orange[1] > 100
