"""The figures of a run, drawn from summary.json, sweep.nc and metrics.jsonl.

Every function `draw_...` takes the run's ReportData, `m`, and returns a figure, or None if this run has nothing for it.
Letters of axes: G strategies, S seeds, Y ways to name the class, A alphas, C classes, H heads, F latents.
"""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from PIL import Image
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from headsteer_jax.data.dataset import gather_images
from headsteer_jax.report.compute import draw_budgets, draw_macs, draw_patches, draw_usage
from headsteer_jax.report.push import draw_push
from headsteer_jax.report.style import (
    COLOURS,
    INK,
    MATRIX_CLASSES,
    MONTAGE_CLASSES,
    MUTED,
    PAGE_INCHES,
    PALE,
    PHASE_COLOURS,
    TILE,
    ReportData,
    apply_style,
    draw_change,
    encode_figure,
    format_number,
    hide_row_axis,
    remove_frame,
    select_series,
    set_alpha_axis,
    set_ticks,
    shorten,
    spread_labels,
)

BASELINE: dict[str, Any] = {"color": INK, "linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1}
SEED_COLOUR = "#0072B2"  # for lines that stand for autoencoder seeds


def head_use_by_class(m: ReportData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute how often each head runs for each class, before and after steering.

    Returns:
      The classes that have test images, those that save most first; then, for these classes, the share of images on
      which each head runs, [C, H]: without steering, and under the strategy `m.main` at its chosen alpha (mean over
      seeds).
    """
    count = m.arrays["test_count"]
    g = list(m.colours).index(m.main)
    a = int(m.arrays["chosen"][g, 0])
    before = m.arrays["test_unsteered_heads_on"] / np.maximum(count, 1)[:, None]
    after = m.arrays["test_heads_on"][g, :, 0, a].mean(axis=0) / np.maximum(count, 1)[:, None]
    order = np.argsort((after - before).mean(axis=1), kind="stable")
    order = order[count[order] > 0]
    return order, before[order], after[order]


def draw_steering(m: ReportData) -> Figure:
    """Draw accuracy and usage against alpha ([LH26], figures 2 and 3)."""
    figure = Figure(figsize=(PAGE_INCHES, 3.9), layout="constrained")
    layer = m.summary["last_layer"]["layer"]
    titles = {"accuracy": "Accuracy", "usage": f"{m.gates_word.capitalize()} in use, layer {layer}"}
    if m.gates_word != "heads":
        titles["macs"] = f"MACs of layer {layer}"
    for axes, (quantity, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        ends = _draw_curves(m, axes, quantity)
        set_alpha_axis(axes, m.arrays["alphas"], 0.024 if len(titles) == 2 else 0.042)
        set_ticks(axes.yaxis, quantity)
        axes.set_title(f"{title} (test, n = {m.images:,})" if len(titles) == 2 else title)
        heights = spread_labels(ends, 0.065 * float(np.ptp(axes.get_ylim())))
        labels = {"unsteered": INK} | m.colours
        for height, (name, colour) in zip(heights, labels.items(), strict=True):
            axes.text(
                1.02, height, name.replace("_", " "), color=colour, va="center", fontsize=8.5,
                transform=axes.get_yaxis_transform(),
            )  # fmt: skip
    return figure


def _draw_curves(m: ReportData, axes: Axes, quantity: str) -> list[float]:
    """Draw one quantity against alpha, a curve for each strategy.

    Returns:
      The heights at which the curves end on the right; the first is the unsteered model's.
    """
    unit = m.summary["last_layer"]["dense_macs"] if quantity == "macs" else 1
    before = m.summary["steering"]["unsteered"][quantity] / unit
    axes.axhline(before, **BASELINE)
    ends = [before]
    for name, colour in m.colours.items():
        result = m.summary["steering"][name]
        curve = result["curve"]
        values = np.array(curve[quantity]) / unit
        low, high = np.transpose(curve[f"{quantity}_ci"]) / unit
        axes.fill_between(curve["alpha"], low, high, color=colour, alpha=0.15, linewidth=0)
        exact = "exact_alphas" in m.arrays
        axes.plot(curve["alpha"], values, "o" if exact else "o-", color=colour, markersize=2.5)
        if exact:
            row = list(m.colours).index(name)
            axes.plot(m.arrays["exact_alphas"], m.arrays[f"exact_{quantity}"][row] / unit, color=colour, linewidth=1.4)
        axes.plot(
            result["alpha"], result[quantity] / unit, "o", color=colour, markerfacecolor="white", markersize=8,
            markeredgewidth=1.8, zorder=3,
        )  # fmt: skip
        ends.append(float(values[-1]))
    return ends


def draw_front(m: ReportData) -> Figure:
    """Draw accuracy against usage: every strategy's path, and what subsets of heads reach without any steering."""
    figure = Figure(figsize=(PAGE_INCHES, 5.4), layout="constrained")
    steering, layer = m.summary["steering"], m.summary["last_layer"]
    points = [steering[name] for name in ("unsteered", *m.colours)]
    overview, detail = figure.subplots(1, 2)
    for axes in (overview, detail):
        _draw_subsets(axes, layer)
        for name, colour in m.colours.items():
            _draw_path(axes, name, colour, steering[name])
        axes.plot(points[0]["usage"], points[0]["accuracy"], "D", color=INK, markersize=7, zorder=5, label="unsteered")
        set_ticks(axes.xaxis, "usage")
        set_ticks(axes.yaxis, "accuracy")
        axes.set_xlabel(f"{m.gates_word} in use, layer {layer['layer']}")
    overview.set_title(f"Accuracy (test, n = {m.images:,})")
    detail.set_title("The same, near the chosen strengths")
    detail.set_xlim(*_limits_around(points, "usage"))
    detail.set_ylim(*_limits_around(points, "accuracy"))
    overview.set_xlim(-0.04, 1.17)
    for name, usage in (("all_on", 1.0), ("all_off", 0.0)):
        overview.annotate(
            name.replace("_", " "), (usage, layer[name]), (6, 0), textcoords="offset points", va="center", fontsize=8.5
        )  # fmt: skip
    figure.legend(*overview.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _draw_subsets(axes: Axes, layer: dict[str, Any]) -> None:
    """Draw what subsets of a layer's heads reach without steering: accuracy against usage."""
    sizes = layer["by_size"]
    usage = [row["usage"] for row in sizes]
    for key, label, line, colour in (
        ("image", "some subset is right, image by image (a bound)", (0, (1, 3)), INK),
        ("oracle", "best subset of each class, by size", (0, (1, 1.2)), INK),
        ("superclass", "best subset of each superclass, by size", (0, (6, 1.5, 1, 1.5)), INK),
        ("fixed", "best fixed subset, by size", "-", MUTED),
        ("random", "random subsets, by size", (0, (4, 2)), MUTED),
    ):
        if sizes[0][key] is not None:  # superclasses are not always known
            axes.plot(
                usage, [row[key] for row in sizes], color=colour, linestyle=line, marker="s", markersize=3,
                linewidth=1.2, label=label,
            )  # fmt: skip
    axes.plot(
        layer["oracle"]["usage"], layer["oracle"]["accuracy"], "*", color=INK, markersize=11, linestyle="none",
        label="smallest subset that keeps each class's accuracy",
    )  # fmt: skip


def _draw_path(axes: Axes, name: str, colour: str, result: dict[str, Any]) -> None:
    """Draw a strategy's path over alpha, pale below 0, and a ring with intervals at its chosen alpha."""
    curve = {key: np.array(values) for key, values in result["curve"].items()}
    rising, falling = curve["alpha"] >= 0, curve["alpha"] <= 0
    axes.plot(curve["usage"][falling], curve["accuracy"][falling], color=colour, alpha=0.35, linewidth=1.2)
    axes.plot(
        curve["usage"][rising], curve["accuracy"][rising], color=colour, marker="o", markersize=2.5,
        label=name.replace("_", " "),
    )  # fmt: skip
    axes.errorbar(
        result["usage"], result["accuracy"], color=colour, marker="o", markerfacecolor="white", markersize=8,
        markeredgewidth=1.8, zorder=4, elinewidth=1.4, capsize=0,
        **{f"{axis}err": np.abs(np.subtract(result[f"{quantity}_ci"], result[quantity]))[:, None]
           for axis, quantity in (("x", "usage"), ("y", "accuracy"))},
    )  # fmt: skip


def _limits_around(points: Sequence[dict[str, Any]], quantity: str) -> tuple[float, float]:
    """Return limits that hold every point's interval, with a margin."""
    ends = [end for point in points for end in point[f"{quantity}_ci"]]
    margin = max(0.12 * (max(ends) - min(ends)), 0.005)
    return min(ends) - margin, max(ends) + margin


def draw_heads(m: ReportData) -> Figure:
    """Draw how often each head runs for each class, before and after steering."""
    order, before, after = head_use_by_class(m)
    names = [shorten(m.dataset.class_names[c]) for c in order]
    half = (len(order) + 1) // 2
    if len(order) > MATRIX_CLASSES:
        end = MATRIX_CLASSES // 2
        blocks = {f"the {end} classes that save most": slice(0, end), f"the {end} that save least": slice(-end, None)}
    elif half > 25:
        blocks = {"": slice(0, half), " ": slice(half, None)}
    else:
        blocks = {"": slice(0, None)}
    longest = max(len(names[block]) for block in blocks.values())
    height = 0.155 * max(longest, 6)
    figure = Figure(figsize=(PAGE_INCHES, 1.5 + height), layout="constrained")
    parts = figure.subfigures(1, len(blocks), squeeze=False)[0]
    for part, (title, block) in zip(parts, blocks.items(), strict=True):
        if title.strip():
            part.suptitle(title, fontsize=9.5, x=0.02, ha="left")
        matrices = {"before": before[block], f"after ({m.main})": after[block], "change": (after - before)[block]}
        _draw_head_matrices(part, matrices, (names[block], m.gate_names), 0.1 / height)
    return figure


def _draw_head_matrices(
    part: SubFigure, matrices: dict[str, np.ndarray], names: tuple[list[str], list[str]], pad: float
) -> None:
    """Draw three matrices [C, H] side by side: shares before, shares after, and their change.

    Args:
      names: of the classes and of the gates.
      pad: the distance of the colour bars, as a share of the height.
    """
    panels = part.subplots(1, 3)
    drawn = []
    for axes, (title, matrix), colours, low in zip(
        panels, matrices.items(), ("Blues", "Blues", "PuOr_r"), (0, 0, -1), strict=True
    ):
        drawn.append(axes.imshow(matrix, cmap=colours, vmin=low, vmax=1, aspect="auto", interpolation="none"))
        axes.set_title(title, loc="center")
        axes.set_xticks(range(matrix.shape[1]), names[1])
        axes.tick_params("x", labelsize=8 if matrix.shape[1] <= 6 else 6)
        axes.set_yticks([])
        remove_frame(axes)
    panels[0].set_yticks(range(len(names[0])), names[0], fontsize=7.5)
    for beside, image, label, ticks in (
        (list(panels[:2]), drawn[0], "images on which the head runs", [0, 0.5, 1]),
        ([panels[2]], drawn[2], "change", [-1, 0, 1]),
    ):
        bar = part.colorbar(
            image, ax=beside, location="bottom", aspect=25 if len(beside) > 1 else 12, ticks=ticks, pad=pad
        )
        _format_percent_bar(bar)
        bar.ax.tick_params(labelsize=7.5, length=0)
        bar.set_label(label, fontsize=8)


def _format_percent_bar(bar: Colorbar) -> None:
    """Label a colour bar in percent, and draw it without a frame."""
    bar.ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.outline.set_visible(False)


def draw_overlap(m: ReportData) -> Figure | None:
    """Draw the share of latents that classes have in common: a matrix, and its distribution over kinds of pairs."""
    if "overlap_class_class" not in m.arrays:
        return None
    shared_CC = m.arrays["overlap_class_class"].mean(axis=0)
    classes = head_use_by_class(m)[0]
    shown = classes
    if len(classes) > MATRIX_CLASSES:
        shown = np.concatenate([classes[: MATRIX_CLASSES // 2], classes[-MATRIX_CLASSES // 2 :]])
    shown = _cluster(shown, shared_CC)
    matrix = np.where(np.eye(len(shown), dtype=bool), np.nan, shared_CC[np.ix_(shown, shown)])
    size = m.config.steer.latents

    figure = Figure(figsize=(PAGE_INCHES, 6.9 if len(shown) > 40 else 4.8), layout="constrained")
    axes, side = figure.subplots(1, 2, width_ratios=[3.1, 1])
    top = float(np.nanmax(matrix, initial=1 / size))
    image = axes.imshow(matrix, cmap="cividis", vmin=0, vmax=top, interpolation="none")
    _label_matrix(axes, [shorten(m.dataset.class_names[c], 13) for c in shown])
    part = f" ({MATRIX_CLASSES} classes: half save most, half least)" if len(classes) > MATRIX_CLASSES else ""
    axes.set_title(f"Shared latents of two classes, of {size} each{part}")
    axes.set_anchor("N")
    _format_percent_bar(figure.colorbar(image, ax=axes, location="bottom", aspect=40, shrink=0.6, pad=0.01))
    _draw_distributions(side, _pair_groups(m, shared_CC))
    return figure


def _cluster(classes: np.ndarray, shared_CC: np.ndarray) -> np.ndarray:
    """Reorder classes so that those with many latents in common are neighbours."""
    if len(classes) <= 2:
        return classes
    tree = linkage(squareform(1 - shared_CC[np.ix_(classes, classes)], checks=False), "average", optimal_ordering=True)
    return classes[leaves_list(tree)]


def _label_matrix(axes: Axes, names: list[str]) -> None:
    """Label the rows of a matrix; of more than 50, every other label on the right, which gives twice the room."""
    step = 1 if len(names) <= 50 else 2
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=7 if step > 1 else 7.5)
    axes.set_xticks([])
    remove_frame(axes)
    if step > 1:
        right = axes.secondary_yaxis("right")
        right.set_yticks(range(1, len(names), 2), names[1::2], fontsize=7)
        right.tick_params(length=0)
        right.spines["right"].set_visible(False)


def _pair_groups(m: ReportData, shared_CC: np.ndarray) -> dict[str, np.ndarray]:
    """Collect the shares of common latents by kind of pair: related or unrelated classes, global and class."""
    upper = np.triu(np.ones(shared_CC.shape, bool), 1)
    groups = {"all pairs of classes": shared_CC[upper]}
    related = m.arrays.get("related")
    if related is not None and (related & upper).any():
        groups = {"related pairs": shared_CC[upper & related], "unrelated pairs": shared_CC[upper & ~related]}
    if "overlap_global_class" in m.arrays:
        groups["global and class"] = m.arrays["overlap_global_class"].ravel()
    return {label: values for label, values in groups.items() if len(values)}


def _draw_distributions(axes: Axes, groups: dict[str, np.ndarray]) -> None:
    """Draw a row for each group: the mean, the middle half and the middle 90% of its values."""
    for row, (label, values) in enumerate(groups.items()):
        low, first, third, high = np.quantile(values, [0.05, 0.25, 0.75, 0.95])
        axes.plot([low, high], [row, row], color=PALE, linewidth=1.5, solid_capstyle="butt")
        axes.plot([first, third], [row, row], color=PALE, linewidth=6, solid_capstyle="butt")
        axes.plot(values.mean(), row, "o", color=INK, markersize=6)
        axes.text(0, row - 0.2, f"{label}\nmean {values.mean():.1%}", va="bottom", fontsize=8.5)
    axes.set_ylim(len(groups) - 0.7, -0.8)
    axes.set_yticks([])
    axes.set_xlim(left=0)
    axes.spines["left"].set_visible(False)
    axes.grid(False, axis="y")
    set_ticks(axes.xaxis, "overlap", most=4)
    axes.set_title("Shared latents")
    axes.set_xlabel("dot: mean, thick: middle half,\nthin: middle 90%", fontsize=8, loc="left")
    axes.set_box_aspect(0.42 * len(groups))
    axes.set_anchor("N")


def _legend_mark(marker: str, colour: str, fill: str, label: str) -> Line2D:
    """Make a legend's entry: one marker and its label."""
    return Line2D([], [], color=colour, marker=marker, markerfacecolor=fill, linestyle="none", label=label)


def draw_savers(m: ReportData) -> Figure | None:
    """Draw the classes that save most at no loss: usage, accuracy and heads, before and after steering."""
    rows = m.summary.get("classes", [])[: m.config.report.top_classes]
    if not rows:
        return None
    figure = Figure(figsize=(PAGE_INCHES, 1.2 + 0.3 * len(rows)), layout="constrained")
    count = len(m.gate_names)
    usage, accuracy, heads = figure.subplots(1, 3, sharey=True, width_ratios=[3, 3, 0.2 * count])
    colours = [COLOURS["class"] if row["saved"] else PALE for row in rows]
    for axes, quantity in ((usage, "usage"), (accuracy, "accuracy")):
        for place, (row, colour) in enumerate(zip(rows, colours, strict=True)):
            draw_change(axes, place, row[f"{quantity}_before"], row[f"{quantity}_after"], colour)
        set_ticks(axes.xaxis, quantity)
        hide_row_axis(axes)
    usage.set_xlim(-0.03, 1.03)
    usage.set_title(f"{m.gates_word.capitalize()} in use, layer {m.summary['last_layer']['layer']}")
    fewest, most = min(row["images"] for row in rows), max(row["images"] for row in rows)
    accuracy.set_title(f"Accuracy (test, n = {fewest if fewest == most else f'{fewest} to {most}'} each)")
    for place, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        before, after = row["heads_before"], row["heads_after"]
        heads.plot(before, [place] * len(before), "s", color=colour, markerfacecolor="white", markersize=8)
        heads.plot(after, [place] * len(after), "s", color=colour, markersize=8)
    heads.set_xticks(range(count), m.gate_names if count <= 6 else [name.removeprefix("h") for name in m.gate_names])
    if m.gates_word != "heads":
        heads.tick_params("x", rotation=90)
    heads.set_xlim(-0.7, count - 0.3)
    heads.set_title(m.gates_word.capitalize())
    remove_frame(heads)
    usage.set_yticks(range(len(rows)), [shorten(row["name"], 24) for row in rows])
    usage.set_ylim(len(rows) - 0.4, -0.6)
    colour = COLOURS["class"]
    marks = [_legend_mark("o", colour, "white", "unsteered"), _legend_mark("o", colour, colour, "class steering")]
    if not all(row["saved"] for row in rows):
        label = f"saves less than {m.config.steer.saving:g}, or loses accuracy"
        marks.append(_legend_mark("o", PALE, PALE, label))
    figure.legend(handles=marks, loc="outside upper left", ncols=3)
    return figure


def _image_strip(images: np.ndarray, of_class: np.ndarray, fires: np.ndarray) -> np.ndarray:
    """Put images in a row, those of the class underlined; images on which the latent is silent are left white.

    Args:
      images: [N, height, width, channels] uint8.
      of_class: [N] bool: the images of the class.
      fires: [N] bool: the images on which the latent fires.

    Returns:
      The row as one image, [height, width, 3] uint8.
    """
    longest = max(images.shape[1:3])
    scale = max(1, TILE // longest) if longest <= TILE else TILE / longest  # whole steps up: small images stay sharp
    height, width = (max(1, round(side * scale)) for side in images.shape[1:3])
    strip = np.full((height + 5, len(images), width + 4, 3), 255, np.uint8)
    for i in np.flatnonzero(fires):
        colour = Image.fromarray(np.broadcast_to(images[i], (*images.shape[1:3], 3)))
        strip[:height, i, :width] = np.asarray(colour.resize((width, height), Image.Resampling.BOX))
        if of_class[i]:
            strip[height + 2 :, i, :width] = (0xD5, 0x5E, 0x00)
    return strip.reshape(height + 5, -1, 3)


def draw_latents(m: ReportData) -> Figure | None:
    """Draw the training images that most activate the latents chosen for the first classes of the ranking.

    None if the main strategy steers without latents.
    """
    by_name = {str(name): c for c, name in enumerate(m.arrays["class_names"])}
    rows = m.summary.get("classes")
    ranked = [by_name[row["name"]] for row in rows] if rows else head_use_by_class(m)[0].tolist()
    classes = ranked[: min(MONTAGE_CLASSES, m.config.report.top_classes)]
    g = list(m.colours).index(m.main)
    chosen = m.arrays["latents"][g, 0]
    chosen = chosen[:, (chosen >= 0).all(axis=0)]  # filled up with -1 where another strategy chooses more
    shown = min(m.config.report.top_latents, chosen.shape[1])
    if not shown:
        return None
    columns = min(2, shown)
    lines = -(-shown // columns)
    figure = Figure(figsize=(PAGE_INCHES, len(classes) * (0.42 + 0.82 * lines)), layout="constrained")
    parts = figure.subfigures(len(classes), 1, squeeze=False)[:, 0]
    for part, c in zip(parts, classes, strict=True):
        part.suptitle(shorten(m.dataset.class_names[c], 60), x=0.008, ha="left", fontsize=10.5, fontweight="bold")
        panels = part.subplots(lines, columns, squeeze=False).ravel()
        for axes in panels:
            axes.set_axis_off()
        for axes, latent in zip(panels, chosen[c, :shown], strict=False):
            _draw_top_images(m, axes, int(latent), c)
    return figure


def _draw_top_images(m: ReportData, axes: Axes, latent: int, c: int) -> None:
    """Draw the training images that most activate a latent of the first seed, chosen for class `c`."""
    count = m.config.report.top_images
    indices = m.arrays["top_images"][latent, :count]
    strip = _image_strip(
        gather_images(m.dataset.train.images, indices),
        m.dataset.train.labels[indices] == c,
        m.arrays["top_activations"][latent, :count] > 0,
    )
    axes.imshow(strip, interpolation="none", aspect="equal", clip_on=False)  # clips differ in their last digits
    axes.set_anchor("W")
    axes.set_title(
        f"latent {latent}: on {m.arrays['frequency'][0, latent]:.1%} of all images, "
        f"{m.arrays['class_frequency'][c, latent]:.0%} of this class",
        fontsize=8.5,
    )


def draw_layers(m: ReportData) -> Figure | None:
    """Draw how steerable each gated layer is: usage and accuracy before and after, at the alpha chosen for it."""
    profile = m.summary["by_layer"]
    if profile is None:
        return None
    rows = [(f"layer {row['layer']}", row) for row in profile["layers"]]
    rows += [("all of them", profile["together"])] if profile["together"] else []
    figure = Figure(figsize=(PAGE_INCHES, 1.4 + 0.3 * len(rows)), layout="constrained")
    usage, accuracy = figure.subplots(1, 2, sharey=True)
    colour = COLOURS["class"]
    for place, (_, row) in enumerate(rows):
        _draw_layer(usage, accuracy, place, row)
    usage.set_xlim(-0.03, 1.18)
    usage.set_xticks([0, 0.25, 0.5, 0.75, 1])
    usage.set_title(f"Heads in use (test, n = {profile['images']:,})")
    accuracy.axvline(0, **BASELINE)
    accuracy.set_title("Change of accuracy")
    set_ticks(accuracy.xaxis, "accuracy")
    for axes in (usage, accuracy):
        hide_row_axis(axes)
    usage.set_yticks(range(len(rows)), [label for label, _ in rows])
    usage.set_ylim(len(rows) - 0.4, -0.6)
    figure.legend(
        handles=[
            _legend_mark("o", colour, "white", "unsteered"),
            _legend_mark("o", colour, colour, "class steering (line: interval)"),
            _legend_mark("x", INK, INK, "all of the layer's heads off"),
        ],
        loc="outside upper left", ncols=3,
    )  # fmt: skip
    return figure


def _draw_layer(usage: Axes, accuracy: Axes, place: int, row: dict[str, Any]) -> None:
    """Draw one layer's row in both panels: usage with the chosen alpha, and the change of accuracy."""
    colour = COLOURS["class"]
    usage.plot([row["usage_before"], row["usage_after"]], [place] * 2, color=colour, linewidth=2.2, zorder=2)
    usage.plot(row["usage_before"], place, "o", color=colour, markerfacecolor="white", markersize=7, zorder=3)
    usage.plot(row["usage_after"], place, "o", color=colour, markersize=7, zorder=4)
    usage.text(1.04, place, f"\N{GREEK SMALL LETTER ALPHA} {format_number(row['alpha'])}", va="center", fontsize=8.5)
    change = row["accuracy_after"] - row["accuracy_before"]
    accuracy.plot(row["accuracy_change_ci"], [place] * 2, color=colour, linewidth=2.2, zorder=2)
    accuracy.plot(change, place, "o", color=colour, markersize=7, zorder=3)
    if "all_off" in row:
        all_off = row["all_off"] - row["accuracy_before"]
        accuracy.plot(all_off, place, "x", color=INK, markersize=6, zorder=3)


def draw_training(m: ReportData) -> Figure | None:
    """Draw loss and accuracy of every phase, and sampled and thresholded usage of every gated layer."""
    if not m.rows:
        return None
    dense = max((row["step"] for row in m.rows if row["phase"] == "dense"), default=0)
    figure = Figure(figsize=(PAGE_INCHES, 6.4), layout="constrained")
    (loss, accuracy), (sampled, thresholded) = figure.subplots(2, 2)
    for phase, colour in PHASE_COLOURS.items():
        offset = 0 if phase == "dense" else dense
        label = phase.replace("_", " ")
        steps, values = select_series(m.rows, phase, "cross_entropy", offset)
        loss.plot(steps, values, color=colour, linewidth=1.2, label=label if len(steps) else None)
        accuracy.plot(*select_series(m.rows, phase, "train_accuracy", offset), color=colour, linewidth=0.9, alpha=0.45)
        accuracy.plot(
            *select_series(m.rows, phase, "validation_accuracy", offset), color=colour, marker="o", markersize=3.5
        )
    loss.set_title("Cross-entropy, training")
    if loss.get_legend_handles_labels()[0]:
        loss.legend()
    accuracy.set_title("Accuracy: training (thin), validation (dots)")
    set_ticks(accuracy.yaxis, "accuracy")
    _draw_usage(m, sampled, thresholded, dense)
    for axes in (loss, accuracy, sampled, thresholded):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    handles, labels = sampled.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(handles)))
    return figure


def _draw_usage(m: ReportData, sampled: Axes, thresholded: Axes, offset: int) -> None:
    """Draw the gated phase's usage, a line for each gated layer, and its target; steps are moved by `offset`."""
    first = m.config.gate.first_layer
    gated_layers = m.config.model.depth - first
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, gated_layers))
    panels = {"sampled": sampled, "thresholded": thresholded}
    for name, axes in panels.items():
        steps, values = select_series(m.rows, "gated", f"usage_{name}", offset)
        for layer in range(gated_layers if len(steps) else 0):
            axes.plot(steps, values[:, layer], color=shades[layer], linewidth=1.2, label=f"layer {first + layer}")
        target = select_series(m.rows, "gated", "usage_target", offset)
        axes.plot(*target, color=INK, linestyle=(0, (4, 3)), linewidth=1, label="target")
        axes.set_title(f"Heads in use, {name} gates (training batches)")
        axes.set_ylim(-0.03, 1.03)
        set_ticks(axes.yaxis, "usage")
    steps, values = select_series(m.rows, "gated", "validation_usage", offset)
    for layer in range(gated_layers if len(steps) else 0):
        thresholded.plot(steps, values[:, layer], "o", color=shades[layer], markersize=3.5)
    thresholded.set_title("Heads in use, thresholded gates (dots: validation)")


def draw_grid(m: ReportData) -> Figure | None:
    """Draw the explained variance and the dead latents of the stage grid against k, a line for each learning rate."""
    grid = m.summary["grid"]
    if grid is None:
        return None
    rows = grid["rows"]
    ks, rates = ([*sorted({row[name] for row in rows})] for name in ("k", "learning_rate"))
    figure = Figure(figsize=(PAGE_INCHES, 3.4), layout="constrained")
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(rates)))
    panels = {"explained_variance": "Explained variance (test)", "dead_fraction": "Dead latents"}
    for axes, (quantity, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for rate, shade in zip(rates, shades, strict=True):
            by_k = [[row[quantity] for row in rows if row["k"] == k and row["learning_rate"] == rate] for k in ks]
            axes.plot(ks, [np.mean(values) for values in by_k], color=shade, label=f"learning rate {rate:g}")
            for k, values in zip(ks, by_k, strict=True):
                axes.plot([k] * len(values), values, "o", color=shade, markersize=4)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(ks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
        axes.set_xlabel("k (dots: seeds)")
        axes.set_title(title)
        set_ticks(axes.yaxis, "usage" if quantity == "explained_variance" else "dead")
    figure.axes[1].set_ylim(bottom=0)
    figure.axes[0].legend()
    return figure


def draw_sae(m: ReportData) -> Figure:
    """Draw the autoencoders' training, and how often their latents fire."""
    figure = Figure(figsize=(PAGE_INCHES, 5.6), layout="constrained")
    (mse, l0), (dead, histogram) = figure.subplots(2, 2)
    epochs = np.arange(1, len(m.arrays["sae_mse"]) + 1)
    for axes, values, title in (
        (mse, m.arrays["sae_mse"], "MSE per component (scaled)"),
        (l0, m.arrays["sae_l0"], f"Active latents (k = {m.config.sae.k})"),
        (dead, m.arrays["sae_dead"], f"Latents silent for {m.config.sae.dead_window / m.config.sae.views:g} epochs"),
    ):
        marker = "o" if len(epochs) == 1 else None
        axes.plot(epochs, values, color=SEED_COLOUR, linewidth=1.2, alpha=0.8, marker=marker)
        axes.set_title(title)
        axes.set_xlabel(f"epoch (a line per seed: {values.shape[1]})")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_ylim(bottom=0)
    set_ticks(dead.yaxis, "dead")
    _draw_frequencies(histogram, m.arrays["frequency"])
    return figure


def _draw_frequencies(axes: Axes, frequency_SF: np.ndarray) -> None:
    """Draw a histogram of how often latents fire, a line for each seed."""
    positive = frequency_SF[frequency_SF > 0]
    lowest = np.floor(np.log10(positive.min())) if len(positive) else -4.0
    bins = np.linspace(lowest, 0, 31)
    for frequency_F in frequency_SF:
        heights, edges = np.histogram(np.log10(frequency_F[frequency_F > 0]), bins)
        axes.stairs(heights, edges, baseline=None, color=SEED_COLOUR, linewidth=1.2, alpha=0.8)
    axes.set_xlim(lowest, 0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * 10**value:g}%"))
    silent = (frequency_SF == 0).sum(axis=1)
    axes.set_title(f"Latents (of {frequency_SF.shape[1]:,}) by how often they fire")
    never = ", ".join(map(str, silent[:6])) + (", …" if len(silent) > 6 else "")
    axes.set_xlabel(f"share of training images (log scale); never: {never}", fontsize=8)
    axes.set_ylim(bottom=0)


FIGURES: dict[str, Callable[[ReportData], Figure | None]] = {
    "steering": draw_steering,
    "front": draw_front,
    "push": draw_push,
    "savers": draw_savers,
    "heads": draw_heads,
    "latents": draw_latents,
    "overlap": draw_overlap,
    "layers": draw_layers,
    "patches": draw_patches,
    "usage": draw_usage,
    "macs": draw_macs,
    "budgets": draw_budgets,
    "training": draw_training,
    "sae": draw_sae,
    "grid": draw_grid,
}
FIGURE_FILES = tuple(f"figures/{name}.{kind}" for name in FIGURES for kind in ("png", "svg"))


def render_figure(m: ReportData, name: str) -> dict[str, bytes] | None:
    """Render one figure as PNG and SVG; return None if this run has nothing for it."""
    with apply_style():
        figure = FIGURES[name](m)
        return None if figure is None else encode_figure(figure, m.config.report.dpi)
