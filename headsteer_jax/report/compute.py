"""The figures of what images cost: kept patches, the use of each kind of gate, and multiply-accumulates (MACs).

Like those of figures.py, every function `draw_...` takes the run's ReportData, `m`, and returns a figure, or None if
this run has nothing for it. Letters of axes: N images, A gated layers, P patches.
"""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from headsteer_jax.data.dataset import gather_images
from headsteer_jax.model.compute import ImageGates, measure_usage
from headsteer_jax.model.gates import SUBLAYERS
from headsteer_jax.model.macs import count_dense_macs
from headsteer_jax.report.style import (
    INK,
    MUTED,
    PAGE_INCHES,
    PALE,
    PHASE_COLOURS,
    TILE,
    ReportData,
    remove_frame,
    select_series,
    set_ticks,
    shorten,
)
from headsteer_jax.train.losses import name_usage

KIND_COLOURS = {"heads": "#0072B2", "attention": "#D55E00", "mlp": "#E69F00", "tokens": "#009E73", "macs": INK}
LABELS = {"heads": "heads", "attention": "attention", "mlp": "MLP", "tokens": "patches"}
EXAMPLES = 3  # easy images, and as many hard ones, whose patches are drawn
LABEL_INCHES = 1.0  # left of an image: its class and its MACs
LEAST_TILE = 0.52  # inches: below that, easy and hard images are drawn one below the other
STRIP_IMAGES = 10  # of the fewest and of the most MACs
MOST_GROUPS = 10  # groups of images by their MACs
DROPPED = np.array([0.14, 0.86 * 232])  # the share of a dropped patch that is left, and the grey that is added


def has_compute(m: ReportData) -> bool:
    """Say whether the run's gates were trained to save compute, beyond the heads of [LH26]."""
    return m.gates is not None and (m.config.gate.kinds != ("heads",) or m.config.gate.budget > 0)


def _macs_share(m: ReportData, images: ImageGates) -> np.ndarray:
    """Compute each image's MACs as a share of the dense model's."""
    return images.macs / count_dense_macs(m.config, len(m.dataset.class_names))


def _choose_examples(m: ReportData, images: ImageGates, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose images with the fewest and with the most MACs, each of another class as far as there are enough.

    Images that are answered rightly come first.

    Returns:
      The easy ones, the easiest first, and the hard ones, the hardest first.
    """
    labels = m.dataset.test.labels
    wrong = images.prediction != labels

    def choose(cost: np.ndarray, excluded: set[int]) -> list[int]:
        order = [int(i) for i in np.lexsort((cost, wrong)) if int(i) not in excluded]
        first_of_class: dict[int, int] = {}
        for i in order:
            first_of_class.setdefault(int(labels[i]), i)
        distinct = list(first_of_class.values())
        return (distinct + [i for i in order if i not in distinct])[:count]

    easy = choose(images.macs, set())
    return np.array(easy), np.array(choose(-images.macs, set(easy)), int)


def _resize(image: np.ndarray, longest: int) -> np.ndarray:
    """Resize an image, [height, width, channels] uint8, to a longest side, in whole steps up; always to RGB."""
    side = max(image.shape[:2])
    scale = max(1, longest // side) if side <= longest else longest / side
    height, width = (max(1, round(length * scale)) for length in image.shape[:2])
    colour = Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)))
    return np.asarray(colour.resize((width, height), Image.Resampling.BOX))


def grey_dropped_patches(image: np.ndarray, runs_P: np.ndarray) -> np.ndarray:
    """Grey the dropped patches of an image.

    Args:
      image: [height, width, 3] uint8.
      runs_P: [P] bool, row by row.
    """
    side = math.isqrt(len(runs_P))
    rows, columns = (np.arange(length) * side // length for length in image.shape[:2])
    runs = runs_P.reshape(side, side)[rows[:, None], columns][..., None]
    return np.where(runs, image, DROPPED[0] * image + DROPPED[1]).astype(np.uint8)


def draw_patches(m: ReportData) -> Figure | None:
    """Draw the patches that each layer keeps, on easy and on hard test images; if there is any, under steering too."""
    if not has_compute(m) or m.gates is None or "tokens" not in m.gates.gates:
        return None
    examples = _choose_examples(m, m.gates, EXAMPLES)
    columns, gap = 1 + len(m.config.layers_with("tokens")), 0.07
    sides = 2 if LABEL_INCHES + columns * (LEAST_TILE + gap) < PAGE_INCHES / 2 else 1  # easy and hard side by side
    tile = min(1.05, (PAGE_INCHES / sides - LABEL_INCHES) / columns - gap)
    versions = [("", m.gates)] + ([("steered", m.steered)] if m.steered is not None else [])
    blocks = list(examples) if sides == 2 else [np.concatenate(examples)]
    rows = max(map(len, blocks)) * len(versions)
    notes = 1 + len(set(m.config.gate.kinds) - {"tokens"})  # lines below a tile
    pitch, top = tile + 0.16 + 0.12 * notes, 0.35
    height = rows * pitch + top
    figure = Figure(figsize=(PAGE_INCHES, height))
    for side, block in enumerate(blocks):
        start = side * PAGE_INCHES / sides
        places = [start + LABEL_INCHES + column * (tile + gap) for column in range(columns)]
        for place, name in zip(places, _name_columns(m, tile), strict=True):
            figure.text((place + tile / 2) / PAGE_INCHES, 1 - 0.22 / height, name, ha="center", fontsize=8)
        for row, (i, (prefix, images)) in enumerate((int(i), version) for i in block for version in versions):
            bottom = height - top - row * pitch - tile
            words = _describe_image(m, images, i, prefix)
            x, y = (start + 0.08) / PAGE_INCHES, (bottom + tile) / height
            figure.text(x, y, words, va="top", fontsize=7.5, linespacing=1.4)
            boxes = [(place / PAGE_INCHES, bottom / height, tile / PAGE_INCHES, tile / height) for place in places]
            _draw_kept(m, [figure.add_axes(box) for box in boxes], images, i)
    return figure


def _name_columns(m: ReportData, tile: float) -> list[str]:
    """Name the columns of tiles that are so many inches wide: the image, then its layers."""
    return ["image", *(f"layer {layer}" if tile > 0.5 else f"{layer}" for layer in m.config.layers_with("tokens"))]


def _draw_kept(m: ReportData, tiles: list[Axes], images: ImageGates, i: int) -> None:
    """Draw an image, and for each layer the patches that it keeps, with a note on what else runs."""
    picture = _resize(gather_images(m.dataset.test.images, np.array([i]))[0], 3 * TILE)
    tiles[0].imshow(picture, interpolation="none")
    for axes, layer, runs_P in zip(tiles[1:], m.config.layers_with("tokens"), images.gates["tokens"][i], strict=True):
        axes.imshow(grey_dropped_patches(picture, runs_P), interpolation="none")
        note = _describe_gates(m, images, i, layer)
        axes.text(0.5, -0.05, note, transform=axes.transAxes, ha="center", va="top", fontsize=6, color=MUTED)
    for axes in tiles:
        axes.set_axis_off()


def _describe_image(m: ReportData, images: ImageGates, i: int, prefix: str) -> str:
    """Describe an image: its class, its MACs, and the answer if it is wrong."""
    label, answer = int(m.dataset.test.labels[i]), int(images.prediction[i])
    lines = [prefix] if prefix else []
    lines += [shorten(m.dataset.class_names[label], 13), f"{_macs_share(m, images)[i]:.0%} of dense"]
    return "\n".join(lines + ([f"taken for {shorten(m.dataset.class_names[answer], 10)}"] if answer != label else []))


def _describe_gates(m: ReportData, images: ImageGates, i: int, layer: int) -> str:
    """Describe what a layer runs for an image: the number of patches and of heads, and what is off."""
    layer_gates = {kind: images.gates[kind][i, layer - m.config.layers_with(kind).start]
           for kind in m.config.gate.kinds_in(layer) if kind in images.gates}  # fmt: skip
    attention, mlp = layer_gates.get("sublayers", (True, True))
    lines = [f"{layer_gates['tokens'].sum()} of {layer_gates['tokens'].size}"]
    if not attention:
        lines.append("no attn")
    elif "heads" in layer_gates:
        count = int(layer_gates["heads"].sum())
        lines.append(f"{count} head{'s' * (count != 1)}")
    return "\n".join(lines if mlp else [*lines, "no MLP"])


def _list_usage(m: ReportData, images: ImageGates) -> dict[str, tuple[range, np.ndarray]]:
    """List for each kind of gate, attention and MLP apart, its layers and the share of gates open in each."""
    usage: dict[str, tuple[range, np.ndarray]] = {}
    by_kind = measure_usage(images.gates)
    for kind in (kind for kind in m.config.gate.kinds if kind in by_kind):
        layers, share = m.config.layers_with(kind), by_kind[kind]
        if kind == "sublayers":
            usage |= {name: (layers, share[:, i]) for i, name in enumerate(SUBLAYERS)}
        else:
            usage[kind] = layers, share
    return usage


def draw_usage(m: ReportData) -> Figure | None:
    """Draw the use of each kind of gate by layer on test, and during training, sampled and thresholded."""
    if not has_compute(m) or m.gates is None:
        return None
    trained = any("usage_sampled" in name for row in m.rows for name in row)
    figure = Figure(figsize=(PAGE_INCHES, 6.2 if trained else 3.4), layout="constrained")
    panels: Any = figure.subplots(1 + trained, 1, height_ratios=[1.25, 1][: 1 + trained], squeeze=False)[:, 0]
    top, *below = panels
    depth, usage = m.config.model.depth, _list_usage(m, m.gates)
    width = 0.8 / len(usage)
    for place, (name, (layers, share_A)) in enumerate(usage.items()):
        shift = (place - (len(usage) - 1) / 2) * width
        ungated = [layer for layer in range(depth) if layer not in layers]
        top.bar(np.array(ungated) + shift, 1.0, width * 0.9, facecolor="white", edgecolor=PALE, linewidth=0.8)
        top.bar(np.array(layers) + shift, share_A, width * 0.9, color=KIND_COLOURS[name], label=LABELS[name])
    top.set_title(f"Share that runs, by layer (test, n = {len(m.gates.macs):,}; hollow: no gate)")
    top.set_xlabel("layer")
    top.set_xticks(range(depth))
    top.grid(False, axis="x")
    top.set_ylim(0, 1.03)
    set_ticks(top.yaxis, "usage")
    top.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    if below:
        _draw_training_usage(m, below[0])
    return figure


def _draw_training_usage(m: ReportData, axes: Axes) -> None:
    """Draw the use of each kind in the gated phase: sampled thin, thresholded thick; MACs and their target dashed."""
    for kind in m.config.gate.kinds:
        for form, linewidth in (("sampled", 0.8), ("thresholded", 1.8)):
            steps, values = select_series(m.rows, "gated", name_usage(f"usage_{form}", kind))
            values = (
                values.reshape(len(steps), -1, 2 if kind == "sublayers" else 1).mean(axis=1) if len(steps) else values
            )
            for i, name in enumerate(SUBLAYERS if kind == "sublayers" else (kind,)):
                if len(steps):
                    axes.plot(steps, values[:, i], color=KIND_COLOURS[name], linewidth=linewidth)
        _draw_target(m, axes, name_usage("usage_target", kind), KIND_COLOURS.get(kind, MUTED))
    for form, linewidth in (("sampled", 0.8), ("thresholded", 1.8)):
        steps, values = select_series(m.rows, "gated", f"macs_{form}")
        if len(steps):
            axes.plot(steps, values, color=INK, linewidth=linewidth, label="MACs" if form == "thresholded" else None)
    _draw_target(m, axes, "macs_target", INK)
    axes.set_title("During the gated phase: thresholded (thick), sampled (thin), target (dashed)")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_ylim(0, 1.03)
    set_ticks(axes.yaxis, "usage")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_target(m: ReportData, axes: Axes, name: str, colour: str) -> None:
    """Draw a target of training, if it was logged."""
    steps, values = select_series(m.rows, "gated", name)
    if len(steps):
        axes.plot(steps, values, color=colour, linestyle=(0, (4, 3)), linewidth=1)


def draw_macs(m: ReportData) -> Figure | None:
    """Draw the MACs of the test images, the accuracy of easy and hard ones, and the easiest and hardest of them."""
    if not has_compute(m) or m.gates is None:
        return None
    share = _macs_share(m, m.gates)
    figure = Figure(figsize=(PAGE_INCHES, 5.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.05, 1])[:, 0]
    histogram, accuracy = upper.subplots(1, 2)
    histogram.hist(share, bins=min(40, max(8, len(share) // 10)), color=KIND_COLOURS["heads"], alpha=0.85)
    histogram.axvline(float(share.mean()), color=INK, linewidth=1, linestyle=(0, (4, 3)))
    histogram.set_title(f"Images by MACs (test, n = {len(share):,}; dashed: mean {share.mean():.1%})")
    histogram.set_xlabel("MACs, as a share of the dense model's")
    set_ticks(histogram.xaxis, "share")
    histogram.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    order, right = np.argsort(share, kind="stable"), m.gates.prediction == m.dataset.test.labels
    groups = np.array_split(order, min(MOST_GROUPS, max(1, len(order) // 5)))
    cost, rate = (np.array([values[group].mean() for group in groups]) for values in (share, right))
    error = np.sqrt(rate * (1 - rate) / np.array([len(group) for group in groups]))
    accuracy.errorbar(cost, rate, error, color=INK, marker="o", markersize=4, linewidth=1, elinewidth=1)
    accuracy.set_title(f"Accuracy of {len(groups)} groups by MACs (bars: standard error)")
    accuracy.set_xlabel("mean MACs of the group, as a share of the dense model's")
    set_ticks(accuracy.xaxis, "share")
    set_ticks(accuracy.yaxis, "accuracy")
    count = min(STRIP_IMAGES, len(order) // 2)
    for axes, title, chosen in zip(
        lower.subplots(2, 1), ("Fewest MACs", "Most MACs"), (order[:count], order[::-1][:count]), strict=True
    ):
        _draw_strip(m, axes, title, chosen, share)
    return figure


def _draw_strip(m: ReportData, axes: Axes, title: str, chosen: np.ndarray, share: np.ndarray) -> None:
    """Draw test images in a row, each with its class and its share of MACs."""
    pictures = [_resize(image, 2 * TILE) for image in gather_images(m.dataset.test.images, chosen)]
    axes.set_title(title)
    remove_frame(axes)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlim(-0.5, STRIP_IMAGES - 0.5)
    axes.set_ylim(-0.05, 1)
    axes.set_aspect("equal")
    axes.set_anchor("W")
    for place, (i, picture) in enumerate(zip(chosen, pictures, strict=True)):
        axes.imshow(picture, extent=(place - 0.44, place + 0.44, 0.12, 1), interpolation="none", clip_on=False)
        name = shorten(m.dataset.class_names[m.dataset.test.labels[i]], 12)
        axes.text(place, 0.07, f"{name}\n{share[i]:.0%}", ha="center", va="top", fontsize=7)
    axes.set_xlim(-0.5, STRIP_IMAGES - 0.5)
    axes.set_ylim(-0.3, 1)


def draw_budgets(m: ReportData) -> Figure | None:
    """Draw accuracy against MACs for the models of several budgets, with the dense models as references."""
    front = m.summary.get("front")
    if front is None:
        return None
    rows = sorted(front["rows"], key=lambda row: row["share"])
    share = [row["share"] for row in rows]
    figure = Figure(figsize=(PAGE_INCHES, 3.7), layout="constrained")
    accuracy, usage = figure.subplots(1, 2)
    _draw_references(accuracy, front)
    value = np.array([row["accuracy"] for row in rows])
    interval = np.abs(np.transpose([row["accuracy_ci"] for row in rows]) - value)
    accuracy.errorbar(share, value, interval, color=INK, marker="o", markersize=5, linewidth=1.4, elinewidth=1)
    for row in rows:
        accuracy.annotate(
            f"{row['budget']:g}", (row["share"], row["accuracy"]), (5, -11), textcoords="offset points", fontsize=7.5
        )  # fmt: skip
    accuracy.set_title(f"Accuracy (test, n = {front['images']:,}; labels: budgets)")
    set_ticks(accuracy.yaxis, "accuracy")
    accuracy.set_xlim(right=1.03)
    accuracy.legend(loc="lower right")
    for name, values in _list_front_usage(rows).items():
        usage.plot(share, values, "o-", color=KIND_COLOURS[name], markersize=4, label=LABELS[name])
    usage.set_title("Share of gates that are open")
    usage.set_ylim(0, 1.03)
    set_ticks(usage.yaxis, "usage")
    usage.legend()
    for axes in (accuracy, usage):
        set_ticks(axes.xaxis, "share")
        axes.set_xlabel("MACs, as a share of the dense model's")
    return figure


def _draw_references(axes: Axes, front: dict[str, Any]) -> None:
    """Draw the accuracies of the dense models as lines, and as points at their own MACs."""
    for name, label in (("dense", "dense, where the gates began"), ("dense_control", "dense control, as long")):
        if (value := front[f"{name}_accuracy"]) is not None:
            axes.axhline(value, color=PHASE_COLOURS[name], linewidth=1, linestyle=(0, (4, 3)), label=label)
            axes.plot(1, value, "D", color=PHASE_COLOURS[name], markersize=5)


def _list_front_usage(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """List for each kind of gate, attention and MLP apart, its use at each budget."""
    usage: dict[str, list[float]] = {}
    for row in rows:
        for kind, value in row["layer_usage"].items():
            if kind == "sublayers":
                for name, share in zip(SUBLAYERS, np.mean(value, axis=0).tolist(), strict=True):
                    usage.setdefault(name, []).append(share)
            else:
                usage.setdefault(kind, []).append(float(np.mean(value)))
    return usage
