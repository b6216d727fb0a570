"""The figure of images a second is drawn from speed.json, whatever models are in it."""

import io

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from headsteer_jax.report.speed import _draw_models, draw_speed


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


def test_models_of_equal_accuracy_all_have_their_names() -> None:
    """Matplotlib leaves out the text of an annotation whose point lies outside of the axes."""
    rows = [make_row(name, 1.0, 0.9, 400) | {"interval": [0.98, 1.0]} for name in ("dense", "gated, masked", "steered")]
    axes = Figure().subplots()
    _draw_models(axes, rows, [100.0, 200.0, 300.0])
    low, high = axes.get_ylim()
    heights = [text.xy[1] for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == ["dense", "gated, masked", "steered"]
    assert all(low <= height <= high for height in heights)
    assert min(np.diff(sorted(heights))) > 0.001  # and none on top of another
