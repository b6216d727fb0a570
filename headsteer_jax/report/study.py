"""A study's report: study.json, study.html with its figures, and study.md, a table for a README or documentation.

Everything is drawn from the content of study.json, which `headsteer_jax/study.py` makes.
"""

import base64
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils.epath import Path
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headsteer_jax.report.render import render_template
from headsteer_jax.report.style import (
    INK,
    MUTED,
    PAGE_INCHES,
    apply_style,
    assign_colours,
    encode_figure,
    format_number,
    set_ticks,
)
from headsteer_jax.runtime.files import make_directory, write_bytes, write_json, write_text

Row = Mapping[str, Any]

NARROW = 0.01  # the least half-width of a forest plot
NONE = "\N{EN DASH}"

LABELS = {
    "dense_accuracy": "accuracy, dense model before the gates",
    "gated_accuracy": "accuracy, gated model",
    "dense_control_accuracy": "accuracy, dense model trained as long",
    "gated_minus_dense_control": "accuracy, gated model minus the dense one trained as long",
    "macs_share": "multiply-accumulates of the gated model, of the dense one's",
    "explained_variance": "variance that the autoencoders explain, test",
    "dead_fraction": "dead latents",
    "gate_agreement": "gates that agree when they read the reconstruction",
    "unsteered.usage": "usage, unsteered",
    "unsteered.accuracy": "accuracy, unsteered",
    "all_on.accuracy": "accuracy, all gates of the layer open",
    "all_off.accuracy": "accuracy, all gates of the layer closed",
}
ENDINGS = {
    "usage": "usage",
    "usage_change": "change of usage",
    "accuracy": "accuracy",
    "accuracy_change": "change of accuracy",
    "classes_saved": "classes saved",
    "total_macs_share": "multiply-accumulates of the layer and of steering, of the dense layer's",
}
# the columns of a grid's table
CELL_METRICS = ("gated_accuracy", "unsteered.usage", "class.usage_change", "class.accuracy_change")
# what the short table of study.md shows of the runs that have it: steering by class, and directions without latents
MAIN_METRICS = (
    "gated_accuracy", "dense_control_accuracy", "gated_minus_dense_control", "macs_share", "all_on.accuracy",
    "all_off.accuracy", "explained_variance", "dead_fraction", "gate_agreement", "unsteered.usage", "class.usage",
    "class.usage_change", "class.accuracy_change",
    "class.by_predicted_class.usage_change", "class.by_predicted_class.accuracy_change",
    "class.by_predicted_class.total_macs_share", "class.classes_saved",
    "gate_aligned.usage_change", "gate_aligned.accuracy_change",
    "mean_difference.usage_change", "mean_difference.accuracy_change", "probe.usage_change", "probe.accuracy_change",
    "gate_bias.usage_change", "gate_bias.accuracy_change",
)  # fmt: skip


def label_metric(name: str) -> str:
    """Label a metric of study.json in words."""
    if name in LABELS:
        return LABELS[name]
    strategy, _, ending = name.rpartition(".")
    by_guess = strategy.endswith(".by_predicted_class")
    strategy = strategy.removesuffix(".by_predicted_class").replace("_", " ")
    return f"{ENDINGS[ending]}, {strategy} steering{' by predicted class' if by_guess else ''}"


def list_strategies(metrics: Sequence[Row]) -> list[str]:
    """List the strategies that a study's metrics are about, in the order of the config."""
    return [row["metric"].removesuffix(".classes_saved") for row in metrics if row["metric"].endswith(".classes_saved")]


def draw_claims(claims: Sequence[Row]) -> Figure | None:
    """Draw a forest plot of every claim: each seed's estimate with its interval, and the pooled one below."""
    shown = [claim for claim in claims if claim["value"] is not None]
    if not shown:
        return None
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    height = 0.95 + 0.21 * (1 + max(len(claim["by_seed"]) for claim in shown))
    figure = Figure(figsize=(PAGE_INCHES * columns / 2, rows * height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, claim in zip(panels, shown, strict=False):
        _draw_forest(axes, claim)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    return figure


def _draw_forest(axes: Axes, claim: Row) -> None:
    """Draw one claim: filled dots hold it, hollow ones do not; the diamond is pooled."""
    axes.axvline(claim["least"], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    by_seed = claim["by_seed"]
    for place, row in enumerate(by_seed):
        if row["value"] is None:
            axes.text(claim["least"], place, " not reached", color=MUTED, fontsize=8, va="center")
            continue
        face = INK if row["holds"] else "white"
        axes.plot(row["interval"], [place, place], color=INK, linewidth=1.2)
        axes.plot(row["value"], place, "o", color=INK, markerfacecolor=face, markersize=4.5)
    if claim["interval"]:
        axes.plot(claim["interval"], [len(by_seed)] * 2, color="#0072B2", linewidth=2)
    axes.plot(claim["value"], len(by_seed), "D", color="#0072B2", markersize=6)
    axes.set_yticks(range(len(by_seed) + 1), [*(f"seed {row['seed']}" for row in by_seed), "pooled"])
    axes.set_ylim(len(by_seed) + 0.6, -0.6)
    axes.tick_params("y", length=0)
    axes.grid(False, axis="y")
    low, high = axes.get_xlim()
    if high - low < NARROW:  # all values are the same: no digits of rounding errors on the axis
        axes.set_xlim(claim["value"] - NARROW, claim["value"] + NARROW)
    set_ticks(axes.xaxis, "usage", 5)
    title = textwrap.fill(claim["claim"], 62)
    axes.set_title(f"{title}\nholds on {claim['holds']} of {claim['seeds']} seeds", fontsize=8.5)


def draw_trade(metrics: Sequence[Row]) -> Figure | None:
    """Draw usage against accuracy: a line for each seed from unsteered to every strategy, and the pooled points."""
    by_name = {row["metric"]: row for row in metrics}
    strategies = list_strategies(metrics)
    if not strategies:
        return None
    figure = Figure(figsize=(PAGE_INCHES, 4.4), layout="constrained")
    axes = figure.subplots()
    points = {name: _find_points(by_name, name) for name in ("unsteered", *strategies)}
    for name, colour in assign_colours(strategies).items():
        for before, after in zip(points["unsteered"], points[name], strict=True):
            axes.plot(*zip(before, after, strict=True), color=colour, linewidth=0.8, alpha=0.45)
        axes.plot(*np.transpose(points[name]), "o", color=colour, markersize=4, alpha=0.7)
        _draw_pooled(axes, by_name, name, "o", colour)
    axes.plot(*np.transpose(points["unsteered"]), "D", color=INK, markersize=4, alpha=0.7)
    _draw_pooled(axes, by_name, "unsteered", "D", INK)
    set_ticks(axes.xaxis, "usage")
    set_ticks(axes.yaxis, "accuracy")
    axes.set_xlabel("usage")
    axes.set_title("Accuracy (test); small: a training seed, large: the mean over seeds")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _find_points(by_name: Mapping[str, Row], name: str) -> list[tuple[float, float]]:
    """Find usage and accuracy of every seed."""
    usage, accuracy = (by_name[f"{name}.{quantity}"]["by_seed"] for quantity in ("usage", "accuracy"))
    return [(first["value"], second["value"]) for first, second in zip(usage, accuracy, strict=True)]


def _draw_pooled(axes: Axes, by_name: Mapping[str, Row], name: str, marker: str, colour: str) -> None:
    """Draw the mean over seeds, with a cross of its intervals."""
    pooled = {quantity: by_name[f"{name}.{quantity}"] for quantity in ("usage", "accuracy")}
    usage, accuracy = (pooled[quantity]["mean"] for quantity in ("usage", "accuracy"))
    if pooled["usage"]["interval"] and pooled["accuracy"]["interval"]:
        axes.plot(pooled["usage"]["interval"], [accuracy, accuracy], color=colour, linewidth=1.4)
        axes.plot([usage, usage], pooled["accuracy"]["interval"], color=colour, linewidth=1.4)
    axes.plot(
        usage, accuracy, marker, color=colour, markerfacecolor="white", markersize=9, markeredgewidth=1.8, zorder=4,
        label=name.replace("_", " "), linestyle="none",
    )  # fmt: skip


def _format_value(value: float | None, name: str = "") -> str:
    """Format a value of a table: fractions with three digits, counts with one.

    Changes have their sign. Those of accuracy, and the values of claims, have four digits, because they are small.
    """
    if value is None:
        return NONE
    if name.endswith("classes_saved"):
        return f"{value:.1f}"
    places = 4 if name == "claim" or name.endswith(("accuracy_change", "minus_dense_control")) else 3
    sign = "+" if places == 4 or "change" in name else ""
    digits = f"{round(value, places) + 0.0:{sign}.{places}f}"
    return digits.replace("-", "\N{MINUS SIGN}")


def _format_interval(interval: Sequence[float] | None, name: str = "") -> str:
    """Format an interval of a table."""
    return NONE if interval is None else " to ".join(_format_value(end, name) for end in interval)


def tabulate_cells(content: Row) -> list[dict[str, Any]]:
    """Tabulate a study's settings, a row for each cell of the grid: its claims and some metrics, by name."""
    rows = []
    for cell in content["cells"]:
        claims = [claim for claim in content["claims"] if claim["cell"] == cell["cell"]]
        metrics = {row["metric"]: row for row in content["metrics"] if row["cell"] == cell["cell"]}
        rows.append(
            {
                "fields": [_format_field(value) for value in cell["fields"].values()],
                "cell": cell["cell"],
                "seeds": len(cell["seeds"]),
                "claims": claims,
                "holding": sum(claim["holds"] == claim["seeds"] for claim in claims),
                "metrics": metrics,
            }
        )
    return rows


def _format_field(value: Any) -> str:
    """Format the value of a config's field."""
    if isinstance(value, list):
        return ", ".join(map(_format_field, value))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return format_number(value) if is_number else str(value)


def write_study(content: dict[str, Any], directory: Path, dpi: int) -> None:
    """Write study.json and, if a run is finished, the figures, study.html and study.md.

    Args:
      content: that of study.json.
      dpi: the resolution of the PNGs.

    Raises:
      HeadSteerError: the disk is full or not writable.
    """
    write_json(directory / "study.json", content)
    if not content["metrics"]:
        return
    cells = tabulate_cells(content)
    figures = make_directory(directory / "figures")
    images: dict[str, str] = {}
    with apply_style():
        for number, cell in enumerate(cells):
            drawn = {"claims": draw_claims(cell["claims"]), "trade": draw_trade([*cell["metrics"].values()])}
            for name, figure in drawn.items():
                if figure is None:
                    continue
                files = encode_figure(figure, dpi)
                stem = f"{name}_{number}" if len(cells) > 1 else name
                for kind, encoded in files.items():
                    write_bytes(figures / f"{stem}.{kind}", encoded)
                images[f"{name}_{number}"] = "data:image/svg+xml;base64," + base64.b64encode(files["svg"]).decode()
    title = directory.name
    values = {
        "name": title, "content": content, "settings": content["settings"], "cells": cells, "images": images,
        "label": label_metric, "value": _format_value, "interval": _format_interval, "cell_metrics": CELL_METRICS,
        "main_metrics": MAIN_METRICS, "strategies": list_strategies,
        "level": f"{100 * content['settings']['confidence']:g}%",
        "failed": [run for run in content["runs"] if run["state"] == "failed"],
    }  # fmt: skip
    write_text(directory / "study.html", render_template("study.html.j2", **values))
    write_text(directory / "study.md", render_template("study.md.j2", **values))
