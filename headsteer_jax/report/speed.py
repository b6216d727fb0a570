"""The figure of images a second: what models cost in time, beside what they cost in multiply-accumulates (MACs)."""

import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headsteer_jax.report.style import PAGE_INCHES, apply_style, set_ticks, spread_labels

MODEL_COLOURS = {"dense": "#7F7F7F", "gated": "#0072B2", "steered": "#009E73", "specialised": "#D55E00"}
DPI = 150


def draw_speed(speed: Mapping[str, Any]) -> bytes:
    """Draw accuracy against images a second and against MACs -> a PNG.

    Args:
      speed: the content of a speed.json.
    """
    rows = speed["rows"]
    batch = max(rows[0]["images_per_second"], key=int)
    with apply_style():
        figure = Figure(figsize=(PAGE_INCHES, 3.7), layout="constrained")
        by_time, by_macs = figure.subplots(1, 2, sharey=True)
        _draw_models(by_time, rows, [row["images_per_second"][batch] for row in rows])
        by_time.set_xlabel(f"images a second, batch {batch}")
        by_time.set_title(f"Accuracy (test, n = {rows[0]['images']:,}) and time")
        _draw_models(by_macs, rows, [row["share_of_macs"] for row in rows])
        by_macs.set_xlabel("MACs, as a share of the dense model's")
        by_macs.set_title("Accuracy and MACs")
        by_macs.invert_xaxis()  # cheaper models are to the right in both
        set_ticks(by_macs.xaxis, "share")
        set_ticks(by_time.yaxis, "accuracy")
        figure.supxlabel(speed["device"], fontsize=7.5)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()


def _draw_models(axes: Axes, rows: list[dict[str, Any]], places: list[float]) -> None:
    """Draw one point with its interval for each model, with its name beside it."""
    for row, place in zip(rows, places, strict=True):
        low, high = row["interval"]
        colour = MODEL_COLOURS.get(re.split("[ ,]", row["what"])[0], "#000000")
        bar = [[row["accuracy"] - low], [high - row["accuracy"]]]
        axes.errorbar([place], [row["accuracy"]], bar, color=colour, marker="o", markersize=6, elinewidth=1)
    span = float(np.ptp([bound for row in rows for bound in row["interval"]])) or 0.01
    accuracies = [row["accuracy"] for row in rows]
    heights = np.asarray(spread_labels(accuracies, 0.08 * span))
    heights -= max(0.0, heights.max() - max(accuracies))  # matplotlib leaves out a label above the axes
    for row, place, height in zip(rows, places, heights, strict=True):
        axes.annotate(row["what"], (place, height), (7, -3), textcoords="offset points", fontsize=8)
    axes.margins(x=0.2)
