"""What a run looks like: the figures, and one HTML page that holds them, the tables and how to read both.

Everything is drawn from summary.json, sweep.nc and metrics.jsonl; nothing is computed here that they do not hold.
Axes: G strategies, S seeds, Y ways to name the class, A alphas, C classes, H heads, F latents.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from PIL import Image
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from headsteer_jax.data.dataset import gather_images
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
    format_number,
    remove_frame,
    set_alpha_axis,
    set_ticks,
    shorten,
    spread_labels,
)


def head_use_by_class(m: ReportData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes that have test images, by saving, and [C', H] how often each head runs before and after steering.

    After: under `main` at its chosen alpha, mean over seeds.
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
    """Accuracy and usage against alpha ([LH26], figures 2 and 3)."""
    figure = Figure(figsize=(PAGE_INCHES, 3.9), layout="constrained")
    before = m.summary["steering"]["unsteered"]
    titles = {"accuracy": "Accuracy", "usage": f"Heads in use, layer {m.summary['last_layer']['layer']}"}
    for axes, (what, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        axes.axhline(before[what], color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        ends = [before[what]]
        for name, colour in m.colours.items():
            result = m.summary["steering"][name]
            curve = result["curve"]
            low, high = np.transpose(curve[f"{what}_ci"])
            axes.fill_between(curve["alpha"], low, high, color=colour, alpha=0.15, linewidth=0)
            exact = "exact_alphas" in m.arrays
            axes.plot(curve["alpha"], curve[what], "o" if exact else "o-", color=colour, markersize=2.5)
            if exact:
                row = list(m.colours).index(name)
                axes.plot(m.arrays["exact_alphas"], m.arrays[f"exact_{what}"][row], color=colour, linewidth=1.4)
            axes.plot(
                result["alpha"], result[what], "o", color=colour, markerfacecolor="white", markersize=8, zorder=3,
                markeredgewidth=1.8,
            )  # fmt: skip
            ends.append(curve[what][-1])
        set_alpha_axis(axes, m.arrays["alphas"])
        set_ticks(axes.yaxis, what)
        axes.set_title(f"{title} (test, n = {m.images:,})")
        places = spread_labels(ends, 0.065 * float(np.ptp(axes.get_ylim())))
        labels = {"unsteered": INK} | m.colours
        for place, (name, colour) in zip(places, labels.items(), strict=True):
            axes.text(
                1.02, place, name.replace("_", " "), color=colour, va="center", fontsize=8.5,
                transform=axes.get_yaxis_transform(),
            )  # fmt: skip
    return figure


def draw_front(m: ReportData) -> Figure:
    """Accuracy against usage: every strategy's path, and what head subsets reach without any steering."""
    figure = Figure(figsize=(PAGE_INCHES, 5.4), layout="constrained")
    steer, layer = m.summary["steering"], m.summary["last_layer"]
    sizes = layer["by_size"]
    usage = [row["usage"] for row in sizes]
    points = [steer[name] for name in ("unsteered", *m.colours)]
    whole, near = figure.subplots(1, 2)
    for axes in (whole, near):
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
        for name, colour in m.colours.items():
            curve = {key: np.array(values) for key, values in steer[name]["curve"].items()}
            rising, falling = curve["alpha"] >= 0, curve["alpha"] <= 0
            axes.plot(curve["usage"][falling], curve["accuracy"][falling], color=colour, alpha=0.35, linewidth=1.2)
            axes.plot(
                curve["usage"][rising], curve["accuracy"][rising], color=colour, marker="o", markersize=2.5,
                label=name.replace("_", " "),
            )  # fmt: skip
            point = steer[name]
            axes.errorbar(
                point["usage"], point["accuracy"], color=colour, marker="o", markerfacecolor="white", markersize=8,
                markeredgewidth=1.8, zorder=4, elinewidth=1.4, capsize=0,
                **{f"{axis}err": np.abs(np.subtract(point[f"{what}_ci"], point[what]))[:, None]
                   for axis, what in (("x", "usage"), ("y", "accuracy"))},
            )  # fmt: skip
        axes.plot(points[0]["usage"], points[0]["accuracy"], "D", color=INK, markersize=7, zorder=5, label="unsteered")
        set_ticks(axes.xaxis, "usage")
        set_ticks(axes.yaxis, "accuracy")
        axes.set_xlabel(f"heads in use, layer {layer['layer']}")
    whole.set_title(f"Accuracy (test, n = {m.images:,})")
    near.set_title("The same, near the chosen strengths")
    near.set_xlim(*_limits_around(points, "usage"))
    near.set_ylim(*_limits_around(points, "accuracy"))
    whole.set_xlim(-0.04, 1.17)
    for name, place in (("all_on", 1.0), ("all_off", 0.0)):
        whole.annotate(
            name.replace("_", " "), (place, layer[name]), (6, 0), textcoords="offset points", va="center", fontsize=8.5
        )  # fmt: skip
    figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _limits_around(points: Sequence[dict[str, Any]], what: str) -> tuple[float, float]:
    """Limits that hold every point's interval with some room."""
    ends = [end for point in points for end in point[f"{what}_ci"]]
    room = max(0.12 * (max(ends) - min(ends)), 0.005)
    return min(ends) - room, max(ends) + room


def draw_heads(m: ReportData) -> Figure:
    """Which heads each class uses, before and after steering."""
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
        panels = part.subplots(1, 3)
        if title.strip():
            part.suptitle(title, fontsize=9.5, x=0.02, ha="left")
        drawn = []
        for axes, panel_title, values, colours, low in zip(
            panels, ("before", f"after ({m.main})", "change"), (before, after, after - before),
            ("Blues", "Blues", "PuOr_r"), (0, 0, -1), strict=True,
        ):  # fmt: skip
            drawn.append(
                axes.imshow(values[block], cmap=colours, vmin=low, vmax=1, aspect="auto", interpolation="none")
            )
            axes.set_title(panel_title, loc="center")
            axes.set_xticks(range(values.shape[1]), [f"h{head}" for head in range(values.shape[1])])
            axes.tick_params("x", labelsize=8 if values.shape[1] <= 6 else 6)
            axes.set_yticks([])
            remove_frame(axes)
        panels[0].set_yticks(range(len(names[block])), names[block], fontsize=7.5)
        for axes, image, label, marks in (
            (list(panels[:2]), drawn[0], "images on which the head runs", [0, 0.5, 1]),
            ([panels[2]], drawn[2], "change", [-1, 0, 1]),
        ):
            bar = part.colorbar(
                image, ax=axes, location="bottom", aspect=25 if len(axes) > 1 else 12, ticks=marks, pad=0.1 / height
            )
            bar.ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            bar.outline.set_visible(False)
            bar.ax.tick_params(labelsize=7.5, length=0)
            bar.set_label(label, fontsize=8)
    return figure


def draw_overlap(m: ReportData) -> Figure | None:
    """Latents that classes have in common."""
    if "overlap_class_class" not in m.arrays:
        return None
    pairs = m.arrays["overlap_class_class"].mean(axis=0)
    shown = head_use_by_class(m)[0]
    if len(shown) > MATRIX_CLASSES:
        shown = np.concatenate([shown[: MATRIX_CLASSES // 2], shown[-MATRIX_CLASSES // 2 :]])
    matrix = pairs[np.ix_(shown, shown)]
    if len(shown) > 2:
        tree = linkage(squareform(1 - matrix, checks=False), "average", optimal_ordering=True)
        leaves = leaves_list(tree)
        shown, matrix = shown[leaves], matrix[np.ix_(leaves, leaves)]
    matrix = np.where(np.eye(len(shown), dtype=bool), np.nan, matrix)
    size = m.config.steer.latents

    figure = Figure(figsize=(PAGE_INCHES, 6.9 if len(shown) > 40 else 4.8), layout="constrained")
    axes, side = figure.subplots(1, 2, width_ratios=[3.1, 1])
    top = float(np.nanmax(matrix, initial=1 / size))
    image = axes.imshow(matrix, cmap="cividis", vmin=0, vmax=top, interpolation="none")
    names = [shorten(m.dataset.class_names[c], 13) for c in shown]
    step = 1 if len(shown) <= 50 else 2  # every other label on the right: twice the room
    axes.set_yticks(range(0, len(shown), step), names[::step], fontsize=7 if step > 1 else 7.5)
    axes.set_xticks([])
    remove_frame(axes)
    if step > 1:
        right = axes.secondary_yaxis("right")
        right.set_yticks(range(1, len(shown), 2), names[1::2], fontsize=7)
        right.tick_params(length=0)
        right.spines["right"].set_visible(False)
    part = (
        f" ({MATRIX_CLASSES} classes: half save most, half least)"
        if len(head_use_by_class(m)[0]) > MATRIX_CLASSES
        else ""
    )
    axes.set_title(f"Shared latents of two classes, of {size} each{part}")
    axes.set_anchor("N")
    bar = figure.colorbar(image, ax=axes, location="bottom", aspect=40, shrink=0.6, pad=0.01)
    bar.ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.outline.set_visible(False)

    upper = np.triu(np.ones(pairs.shape, bool), 1)
    groups = {"all pairs of classes": pairs[upper]}
    related = m.arrays.get("related")
    if related is not None and (related & upper).any():
        groups = {"related pairs": pairs[upper & related], "unrelated pairs": pairs[upper & ~related]}
    if "overlap_global_class" in m.arrays:
        groups["global and class"] = m.arrays["overlap_global_class"].ravel()
    groups = {label: values for label, values in groups.items() if len(values)}
    for row, (label, values) in enumerate(groups.items()):
        low, first, third, high = np.quantile(values, [0.05, 0.25, 0.75, 0.95])
        side.plot([low, high], [row, row], color=PALE, linewidth=1.5, solid_capstyle="butt")
        side.plot([first, third], [row, row], color=PALE, linewidth=6, solid_capstyle="butt")
        side.plot(values.mean(), row, "o", color=INK, markersize=6)
        side.text(0, row - 0.2, f"{label}\nmean {values.mean():.1%}", va="bottom", fontsize=8.5)
    side.set_ylim(len(groups) - 0.7, -0.8)
    side.set_yticks([])
    side.set_xlim(left=0)
    side.spines["left"].set_visible(False)
    side.grid(False, axis="y")
    set_ticks(side.xaxis, "overlap", most=4)
    side.set_title("Shared latents")
    side.set_xlabel("dot: mean, thick: middle half,\nthin: middle 90%", fontsize=8, loc="left")
    side.set_box_aspect(0.42 * len(groups))
    side.set_anchor("N")
    return figure


def draw_savers(m: ReportData) -> Figure | None:
    """The classes that save most at no loss: usage, accuracy and heads, before and after."""
    table = m.summary.get("classes", [])[: m.config.report.top_classes]
    if not table:
        return None
    figure = Figure(figsize=(PAGE_INCHES, 1.2 + 0.3 * len(table)), layout="constrained")
    count = m.config.model.heads
    *panels, which = figure.subplots(1, 3, sharey=True, width_ratios=[3, 3, 0.2 * count])
    for axes, what in zip(panels, ("usage", "accuracy"), strict=True):
        for row, one in enumerate(table):
            colour = COLOURS["class"] if one["saved"] else PALE
            before, after = one[f"{what}_before"], one[f"{what}_after"]
            axes.plot([before, after], [row, row], color=colour, linewidth=2.2, solid_capstyle="butt", zorder=2)
            axes.plot(before, row, "o", color=colour, markerfacecolor="white", markersize=7, zorder=3)
            axes.plot(after, row, "o", color=colour, markersize=7, zorder=4)
        set_ticks(axes.xaxis, what)
        axes.grid(False, axis="y")
        axes.tick_params("y", length=0)
        axes.spines["left"].set_visible(False)
    layer = m.summary["last_layer"]["layer"]
    panels[0].set_xlim(-0.03, 1.03)
    panels[0].set_title(f"Heads in use, layer {layer}")
    fewest, most = min(one["images"] for one in table), max(one["images"] for one in table)
    panels[1].set_title(f"Accuracy (test, n = {fewest if fewest == most else f'{fewest} to {most}'} each)")
    for row, one in enumerate(table):
        colour = COLOURS["class"] if one["saved"] else PALE
        before, after = one["heads_before"], one["heads_after"]
        which.plot(before, [row] * len(before), "s", color=colour, markerfacecolor="white", markersize=8)
        which.plot(after, [row] * len(after), "s", color=colour, markersize=8)
    which.set_xticks(range(count), [f"h{head}" if count <= 6 else f"{head}" for head in range(count)])
    which.set_xlim(-0.7, count - 0.3)
    which.set_title("Heads")
    remove_frame(which)
    panels[0].set_yticks(range(len(table)), [shorten(one["name"], 24) for one in table])
    panels[0].set_ylim(len(table) - 0.4, -0.6)

    def ring(colour: str, fill: str, label: str) -> Line2D:
        return Line2D([], [], color=colour, marker="o", markerfacecolor=fill, linestyle="none", label=label)

    colour = COLOURS["class"]
    handles = [ring(colour, "white", "unsteered"), ring(colour, colour, "class steering")]
    if not all(one["saved"] for one in table):
        handles.append(ring(PALE, PALE, f"saves less than {m.config.steer.saving:g}, or loses accuracy"))
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure


def _image_strip(images: np.ndarray, own: np.ndarray, fires: np.ndarray) -> np.ndarray:
    """Images in a row, [height, width, 3] uint8: those of the class underlined, those without activation left white."""
    longest = max(images.shape[1:3])
    scale = max(1, TILE // longest) if longest <= TILE else TILE / longest  # whole steps up: small images stay sharp
    height, width = (max(1, round(side * scale)) for side in images.shape[1:3])
    strip = np.full((height + 5, len(images), width + 4, 3), 255, np.uint8)
    for i in np.flatnonzero(fires):
        colour = Image.fromarray(np.broadcast_to(images[i], (*images.shape[1:3], 3)))
        strip[:height, i, :width] = np.asarray(colour.resize((width, height), Image.Resampling.BOX))
        if own[i]:
            strip[height + 2 :, i, :width] = (0xD5, 0x5E, 0x00)
    return strip.reshape(height + 5, -1, 3)


def draw_latents(m: ReportData) -> Figure:
    """The training images that most activate the latents chosen for some classes (first seed)."""
    by_name = {str(name): c for c, name in enumerate(m.arrays["class_names"])}
    rows = m.summary.get("classes")
    ranked = [by_name[row["name"]] for row in rows] if rows else head_use_by_class(m)[0].tolist()
    classes = ranked[: min(MONTAGE_CLASSES, m.config.report.top_classes)]
    g = list(m.colours).index(m.main)
    chosen = m.arrays["latents"][g, 0]
    shown = min(m.config.report.top_latents, chosen.shape[1])
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
            indices = m.arrays["top_images"][latent]
            strip = _image_strip(
                gather_images(m.dataset.train.images, indices),
                m.dataset.train.labels[indices] == c,
                m.arrays["top_activations"][latent] > 0,
            )
            axes.imshow(strip, interpolation="none", aspect="equal", clip_on=False)  # clips differ in their last digits
            axes.set_anchor("W")
            axes.set_title(
                f"latent {latent}: on {m.arrays['frequency'][0, latent]:.1%} of all images, "
                f"{m.arrays['class_frequency'][c, latent]:.0%} of this class",
                fontsize=8.5,
            )
    return figure


def draw_layers(m: ReportData) -> Figure | None:
    """How steerable each gated layer is: usage and accuracy before and after, at the alpha chosen for it."""
    found = m.summary["by_layer"]
    if found is None:
        return None
    rows = [(f"layer {row['layer']}", row) for row in found["layers"]]
    rows += [("all of them", found["together"])] if found["together"] else []
    figure = Figure(figsize=(PAGE_INCHES, 1.4 + 0.3 * len(rows)), layout="constrained")
    usage, accuracy = figure.subplots(1, 2, sharey=True)
    colour = COLOURS["class"]
    for place, (_, row) in enumerate(rows):
        usage.plot([row["usage_before"], row["usage_after"]], [place] * 2, color=colour, linewidth=2.2, zorder=2)
        usage.plot(row["usage_before"], place, "o", color=colour, markerfacecolor="white", markersize=7, zorder=3)
        usage.plot(row["usage_after"], place, "o", color=colour, markersize=7, zorder=4)
        usage.text(
            1.04, place, f"\N{GREEK SMALL LETTER ALPHA} {format_number(row['alpha'])}", va="center", fontsize=8.5
        )
        change = row["accuracy_after"] - row["accuracy_before"]
        accuracy.plot(row["accuracy_change_ci"], [place] * 2, color=colour, linewidth=2.2, zorder=2)
        accuracy.plot(change, place, "o", color=colour, markersize=7, zorder=3)
        if "all_off" in row:
            off = row["all_off"] - row["accuracy_before"]
            accuracy.plot(off, place, "x", color=INK, markersize=6, zorder=3)
    usage.set_xlim(-0.03, 1.18)
    usage.set_xticks([0, 0.25, 0.5, 0.75, 1])
    usage.set_title(f"Heads in use (test, n = {found['images']:,})")
    accuracy.axvline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    accuracy.set_title("Change of accuracy")
    set_ticks(accuracy.xaxis, "accuracy")
    for axes in (usage, accuracy):
        axes.grid(False, axis="y")
        axes.tick_params("y", length=0)
        axes.spines["left"].set_visible(False)
    usage.set_yticks(range(len(rows)), [label for label, _ in rows])
    usage.set_ylim(len(rows) - 0.4, -0.6)

    def mark(marker: str, ink: str, fill: str, label: str) -> Line2D:
        return Line2D([], [], color=ink, marker=marker, markerfacecolor=fill, linestyle="none", label=label)

    figure.legend(
        handles=[
            mark("o", colour, "white", "unsteered"), mark("o", colour, colour, "class steering (line: interval)"),
            mark("x", INK, INK, "all of the layer's heads off"),
        ],
        loc="outside upper left", ncols=3,
    )  # fmt: skip
    return figure


def _series(rows: list[dict[str, Any]], phase: str, key: str, offset: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric in one phase."""
    found = [(row["step"] + offset, row[key]) for row in rows if row["phase"] == phase and key in row]
    return np.array([step for step, _ in found]), np.array([value for _, value in found])


def draw_training(m: ReportData) -> Figure | None:
    """Loss and accuracy of every phase; sampled and thresholded usage of every gated layer."""
    if not m.rows:
        return None
    dense = max((row["step"] for row in m.rows if row["phase"] == "dense"), default=0)
    figure = Figure(figsize=(PAGE_INCHES, 6.4), layout="constrained")
    (loss, accuracy), (sampled, thresholded) = figure.subplots(2, 2)
    for phase, colour in PHASE_COLOURS.items():
        offset = 0 if phase == "dense" else dense
        label = phase.replace("_", " ")
        steps, values = _series(m.rows, phase, "cross_entropy", offset)
        loss.plot(steps, values, color=colour, linewidth=1.2, label=label if len(steps) else None)
        accuracy.plot(*_series(m.rows, phase, "train_accuracy", offset), color=colour, linewidth=0.9, alpha=0.45)
        accuracy.plot(*_series(m.rows, phase, "validation_accuracy", offset), color=colour, marker="o", markersize=3.5)
    loss.set_title("Cross-entropy, training")
    if loss.get_legend_handles_labels()[0]:
        loss.legend()
    accuracy.set_title("Accuracy: training (thin), validation (dots)")
    set_ticks(accuracy.yaxis, "accuracy")

    first = m.config.gate.first_layer
    gated_layers = m.config.model.depth - first
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, gated_layers))
    panels = {"sampled": sampled, "thresholded": thresholded}
    for name, axes in panels.items():
        steps, values = _series(m.rows, "gated", f"usage_{name}", dense)
        for layer in range(gated_layers if len(steps) else 0):
            axes.plot(steps, values[:, layer], color=shades[layer], linewidth=1.2, label=f"layer {first + layer}")
        target = _series(m.rows, "gated", "usage_target", dense)
        axes.plot(*target, color=INK, linestyle=(0, (4, 3)), linewidth=1, label="target")
        axes.set_title(f"Heads in use, {name} gates (training batches)")
        axes.set_ylim(-0.03, 1.03)
        set_ticks(axes.yaxis, "usage")
    steps, values = _series(m.rows, "gated", "validation_usage", dense)
    for layer in range(gated_layers if len(steps) else 0):
        thresholded.plot(steps, values[:, layer], "o", color=shades[layer], markersize=3.5)
    thresholded.set_title("Heads in use, thresholded gates (dots: validation)")
    for axes in (loss, accuracy, sampled, thresholded):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    handles, labels = sampled.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(handles)))
    return figure


def draw_grid(m: ReportData) -> Figure | None:
    """What k and the learning rate do: explained variance and dead latents of the stage grid."""
    found = m.summary["grid"]
    if found is None:
        return None
    rows = found["rows"]
    ks, rates = ([*sorted({row[name] for row in rows})] for name in ("k", "learning_rate"))
    figure = Figure(figsize=(PAGE_INCHES, 3.4), layout="constrained")
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(rates)))
    panels = {"explained_variance": "Explained variance (test)", "dead_fraction": "Dead latents"}
    for axes, (what, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for rate, shade in zip(rates, shades, strict=True):
            own = [[row[what] for row in rows if row["k"] == k and row["learning_rate"] == rate] for k in ks]
            axes.plot(ks, [np.mean(values) for values in own], color=shade, label=f"learning rate {rate:g}")
            for k, values in zip(ks, own, strict=True):
                axes.plot([k] * len(values), values, "o", color=shade, markersize=4)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(ks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
        axes.set_xlabel("k (dots: seeds)")
        axes.set_title(title)
        set_ticks(axes.yaxis, "usage" if what == "explained_variance" else "dead")
    figure.axes[1].set_ylim(bottom=0)
    figure.axes[0].legend()
    return figure


def draw_sae(m: ReportData) -> Figure:
    """The autoencoders' training, and how often their latents fire."""
    figure = Figure(figsize=(PAGE_INCHES, 5.6), layout="constrained")
    (mse, l0), (dead, histogram) = figure.subplots(2, 2)
    epochs = np.arange(1, len(m.arrays["sae_mse"]) + 1)
    for axes, values, title in (
        (mse, m.arrays["sae_mse"], "MSE per component (scaled)"),
        (l0, m.arrays["sae_l0"], f"Active latents (k = {m.config.sae.k})"),
        (dead, m.arrays["sae_dead"], f"Latents silent for {m.config.sae.dead_window:g} epochs"),
    ):
        axes.plot(epochs, values, color="#0072B2", linewidth=1.2, alpha=0.8, marker="o" if len(epochs) == 1 else None)
        axes.set_title(title)
        axes.set_xlabel(f"epoch (a line per seed: {values.shape[1]})")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_ylim(bottom=0)
    set_ticks(dead.yaxis, "dead")
    frequency = m.arrays["frequency"]
    fires = frequency[frequency > 0]
    lowest = np.floor(np.log10(fires.min())) if len(fires) else -4.0
    bins = np.linspace(lowest, 0, 31)
    for one in frequency:
        heights, edges = np.histogram(np.log10(one[one > 0]), bins)
        histogram.stairs(heights, edges, baseline=None, color="#0072B2", linewidth=1.2, alpha=0.8)
    histogram.set_xlim(lowest, 0)
    histogram.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    histogram.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * 10**value:g}%"))
    silent = (frequency == 0).sum(axis=1)
    histogram.set_title(f"Latents (of {frequency.shape[1]:,}) by how often they fire")
    never = ", ".join(map(str, silent[:6])) + (", …" if len(silent) > 6 else "")
    histogram.set_xlabel(f"share of training images (log scale); never: {never}", fontsize=8)
    histogram.set_ylim(bottom=0)
    return figure


FIGURES: dict[str, Callable[[ReportData], Figure | None]] = {
    "steering": draw_steering,
    "front": draw_front,
    "savers": draw_savers,
    "heads": draw_heads,
    "latents": draw_latents,
    "overlap": draw_overlap,
    "layers": draw_layers,
    "training": draw_training,
    "sae": draw_sae,
    "grid": draw_grid,
}


def render_figure(m: ReportData, name: str) -> dict[str, bytes] | None:
    """One figure as PNG and SVG; None where this run has nothing for it."""
    with apply_style():
        figure = FIGURES[name](m)
        if figure is None:
            return None
        files = {}
        for kind, metadata in (("png", {}), ("svg", {"Date": None, "Creator": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=m.config.report.dpi, metadata=metadata)
            files[kind] = buffer.getvalue()
        return files
