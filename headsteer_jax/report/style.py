"""The style of the figures: the colours, fonts, axes and labels that all of them share."""

import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import Dataset
from headsteer_jax.model.compute import ImageGates

PAGE_INCHES = 9.5  # a figure's width: the page's column, at 96 pixels an inch
MATRIX_CLASSES = 100  # as many rows are legible; of more classes, both ends of the ranking are shown
MONTAGE_CLASSES = 6  # classes whose latents are shown with their images
TILE = 56  # pixels: the montage shows no image larger
COLOURS = {
    "class": "#D55E00",
    "global": "#0072B2",
    "random": "#009E73",
    "matched_random": "#CC79A7",
    "gate_aligned": "#E69F00",
}  # Okabe-Ito
MORE_COLOURS = (  # for further strategies, in order
    "#56B4E9", "#8C6D31", "#666666", "#7B4EA3", "#A61C3C", "#2A9D8F", "#8FA31E", "#4B5FAE", "#D98880", "#20403A",
    "#B59A00", "#B88AE0",
)  # fmt: skip
PHASE_COLOURS = {"dense": "#7F7F7F", "gated": "#000000", "dense_control": "#E69F00"}
INK, MUTED, PALE = "#222222", "#767676", "#B5B5B5"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],  # of the same widths: an SVG's labels fit with either
    "font.size": 9,
    "text.parse_math": False,  # class names hold dollar signs
    "text.color": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E8E8E8",
    "grid.linewidth": 0.7,
    "xtick.color": "#999999",
    "ytick.color": "#999999",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "headsteer",  # the same figure has the same bytes
}


class ReportData(NamedTuple):
    """A run's results, from which every figure and page is drawn."""

    config: Config
    dataset: Dataset
    summary: dict[str, Any]
    arrays: dict[str, np.ndarray]
    rows: list[dict[str, Any]]  # metrics.jsonl
    gates: ImageGates | None = None  # of the test images
    steered: ImageGates | None = None  # the same under steering

    @property
    def colours(self) -> dict[str, str]:
        """Give each strategy a colour, in the order of the config."""
        return assign_colours([str(name) for name in self.arrays["strategies"]])

    @property
    def main(self) -> str:
        """Pick the strategy for figures that show only one: `class` if it was run, else the first."""
        return "class" if "class" in self.colours else next(iter(self.colours))

    @property
    def gate_names(self) -> list[str]:
        """Name the gates of the steered layer: h0, h1 and so on, then attn and MLP if it gates these."""
        names = self.summary["last_layer"].get("gates") or range(self.arrays["test_heads_on"].shape[-1])
        return [{"attention": "attn", "mlp": "MLP"}.get(str(name), f"h{name}") for name in names]

    @property
    def gates_word(self) -> str:
        """Name all gates of the steered layer in one word: heads, or gates if it gates attention and the MLP too."""
        return "heads" if all(name.startswith("h") for name in self.gate_names) else "gates"

    @property
    def images(self) -> int:
        """Count the test images that were steered."""
        return int(self.arrays["test_count"].sum())


def assign_colours(names: Sequence[str]) -> dict[str, str]:
    """Give each strategy a colour, by name."""
    more = iter(MORE_COLOURS * len(names))
    return {name: COLOURS.get(name) or next(more) for name in names}


def encode_figure(figure: Figure, dpi: int) -> dict[str, bytes]:
    """Encode a figure as PNG and SVG, by kind; the same figure has the same bytes."""
    files = {}
    for kind, metadata in (("png", {}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
        files[kind] = buffer.getvalue()
    return files


def select_series(rows: list[dict[str, Any]], phase: str, key: str, offset: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Select the steps and values of one metric in one phase; the steps are moved by `offset`."""
    points = [(row["step"] + offset, row[key]) for row in rows if row["phase"] == phase and key in row]
    return np.array([step for step, _ in points]), np.array([value for _, value in points])


def shorten(name: str, length: int = 16) -> str:
    """Shorten a class name for a label: printable, on one line, cut in its middle if it is too long."""
    name = " ".join("".join(c if c.isprintable() else " " for c in str(name)).split())
    return name if len(name) <= length else f"{name[: length - 5]}…{name[-4:]}"


def format_number(value: float) -> str:
    """Format a number in up to six digits, without trailing zeros and with a real minus sign."""
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def format_signed(value: float, digits: int) -> str:
    """Format a rounded number with its sign; never minus zero."""
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def format_heads(heads: Iterable[int]) -> str:
    """Format head numbers as a set: [2, 5] becomes {h2, h5}."""
    return "{" + ", ".join(f"h{head}" for head in heads) + "}"


def spread_labels(values: Sequence[float], gap: float) -> list[float]:
    """Move values apart, as little as possible, until neighbours differ by `gap`: heights for labels beside lines."""
    order = np.argsort(values, kind="stable")
    places = np.array(values, float)[order]
    for _ in range(20 * len(places)):  # neighbours that are too close move by the same distance
        for i in range(len(places) - 1):
            push = max(0.0, gap - (places[i + 1] - places[i])) / 2
            places[i : i + 2] += (-push, push)
    return places[np.argsort(order)].tolist()


def set_alpha_axis(axes: Axes, alphas: np.ndarray, character: float = 0.024) -> None:
    """Scale the alpha axis linearly near 0 and logarithmically beyond, and label the alphas that there is room for.

    Args:
      character: the width of a character in a label, as a share of the axis.
    """
    unit = np.abs(alphas[alphas != 0]).min() if (alphas != 0).any() else 1.0
    axes.set_xscale("asinh", linear_width=float(unit))
    character *= float(np.ptp(np.arcsinh(alphas / unit)))
    shown: list[float] = []
    ends = (0, alphas[0], alphas[-1])
    for alpha in sorted(alphas.tolist(), key=lambda a: (a not in ends, np.log2(abs(a) or 1) % 1 != 0, -abs(a))):
        for other in shown:
            apart = abs(np.arcsinh(alpha / unit) - np.arcsinh(other / unit))
            if apart < character * (1 + (len(format_number(alpha)) + len(format_number(other))) / 2):
                break
        else:
            shown.append(alpha)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    axes.set_xlabel("steering strength \N{GREEK SMALL LETTER ALPHA}")


def set_ticks(axis: Axis, quantity: str, most: int = 6) -> None:
    """Label at most so many ticks: usage in fractions, as in [LH26], any other quantity in percent."""
    percent = quantity != "usage"
    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(
        FuncFormatter(
            lambda value, _: f"{format_number(round(100 * value, 6))}%" if percent else format_number(round(value, 6))
        )
    )


def remove_frame(axes: Axes) -> None:
    """Remove frame, grid and ticks, as images need none."""
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


@contextmanager
def apply_style() -> Iterator[None]:
    """Apply this package's style, on matplotlib's defaults, to figures that are drawn inside.

    The user's matplotlibrc and styles are ignored, and are restored afterwards.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a browser has the fonts that a PNG lacks
        yield


def draw_change(axes: Axes, row: int, before: float, after: float, colour: str) -> None:
    """Draw a row's change: a hollow dot before, a filled one after, and a line between them."""
    axes.plot([before, after], [row, row], color=colour, linewidth=2.2, solid_capstyle="butt", zorder=2)
    axes.plot(before, row, "o", color=colour, markerfacecolor="white", markersize=7, zorder=3)
    axes.plot(after, row, "o", color=colour, markersize=7, zorder=4)


def hide_row_axis(axes: Axes) -> None:
    """Hide the vertical axis of a panel whose rows are named beside it."""
    axes.grid(False, axis="y")
    axes.tick_params("y", length=0)
    axes.spines["left"].set_visible(False)
