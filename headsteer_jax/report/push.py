"""The figure of why usage changes under amplification."""

import numpy as np
from matplotlib.figure import Figure

from headsteer_jax.analysis.push import center_classes
from headsteer_jax.report.style import INK, MUTED, PAGE_INCHES, ReportData, draw_change, hide_row_axis


def draw_push(m: ReportData) -> Figure | None:
    """Draw why usage changes: what steering adds to the gates against the classes' own gate logits, and the limits."""
    explained = {name: m.summary["steering"][name].get("push") for name in m.colours}
    explained = {name: row for name, row in explained.items() if row}
    if m.main not in explained:
        return None
    figure = Figure(figsize=(PAGE_INCHES, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    deviation_CH, push_CH = (
        center_classes(m.arrays["gate_logits"]),
        m.arrays["push"][list(m.colours).index(m.main)].mean(axis=0),
    )
    for line in (left.axhline, left.axvline):
        line(0, color=MUTED, linewidth=0.8, zorder=1)
    left.plot(deviation_CH.ravel(), push_CH.ravel(), "o", color=m.colours[m.main], markersize=3, alpha=0.45, mew=0)
    left.set_title(f"Push of {m.main.replace('_', ' ')} steering")
    left.set_xlabel("mean gate logit of the class less that of all classes")
    left.locator_params(axis="x", nbins=5)  # labels of small numbers are long
    left.set_ylabel("added to the gate logit at alpha 1")
    for row, (name, values) in enumerate(explained.items()):
        curve = m.summary["steering"][name]["curve"]
        last = curve["usage"][int(np.argmax(curve["alpha"]))]
        before = m.summary["steering"]["unsteered"]["usage"]
        draw_change(right, row, before, last, m.colours[name])
        right.plot(values["limit"], row, "|", color=INK, markersize=15, markeredgewidth=2, zorder=5)
        right.text(1.02, row, name.replace("_", " "), va="center", fontsize=8.5, color=m.colours[name])
    right.set_ylim(len(explained) - 0.4, -0.6)
    right.set_xlim(0, 1)
    hide_row_axis(right)
    right.set_yticks([])
    right.set_title("Usage: unsteered, at the largest alpha, its limit")
    right.set_xlabel("hollow: unsteered, filled: largest alpha, bar: limit")
    return figure
