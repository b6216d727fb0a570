"""The report page: complete, self-contained, escaped and legible, with the summary's numbers, byte for byte."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
from etils import epath
from made_run import made_run
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from PIL import Image

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.macs import count_dense_macs
from headsteer_jax.report import figures, page, style
from headsteer_jax.report.claims import word_verdict
from headsteer_jax.report.strategies import SENTENCES

HOSTILE = (
    '<b>bold</b> & "quoted"',
    "it's 50% & <script>alert(1)</script>",
    "$x$ and $y_1$",
    "\u9905\u7acb\nwith a bell\x07",
)
LONG = tuple(f"great crested something number {c}, also called the thing" for c in range(1000))


CASES: dict[str, dict[str, Any]] = {
    "usual": {"alphas": (-4.0, -2.0, -1.0, -0.5, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)},
    "hostile names, 12 heads, colour, lazy, one seed, nothing related, no suppression": {
        "names": HOSTILE, "heads": 12, "channels": 3, "lazy": True, "seeds": 1, "related": False, "alphas": (0.5, 1.0),
    },
    "no class strategy, 3 heads, 4 classes steered, no training rows": {
        "strategies": ("random", "global"), "heads": 3, "only": 4, "rows": False,
    },
    "class strategy alone, one class steered, only suppression": {
        "strategies": ("class",), "only": 1, "alphas": (-1.0,),
    },
    "gates of all kinds on a budget": {"compute": True, "channels": 3, "names": HOSTILE},
    "1000 long names": {
        "names": LONG, "classes": 1000, "per_class": 2, "seeds": 1, "strategies": ("class", "random"),
        "alphas": (1.0, 2.0), "heads": 3, "rows": False,
    },
}  # fmt: skip
COMPUTE = {"patches", "usage", "macs", "budgets"}  # the figures of runs that gate more than heads, or have a budget
MISSING = {  # the other figures that a case cannot have
    "no class strategy, 3 heads, 4 classes steered, no training rows": {"savers", "overlap", "training"},
    "1000 long names": {"training"},
}


def missing(case: str) -> set[str]:
    """The figures that a case cannot have."""
    return MISSING.get(case, set()) | (set() if "compute" in CASES[case] else COMPUTE)


class Page(HTMLParser):
    """Tags, attributes and tables of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.values: list[str] = []
        self.text = ""
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._rows: list[list[str]] = []
            self.tables[dict(attrs).get("id") or f"table {len(self.tables)}"] = self._rows
        elif tag == "tr":
            self._rows.append([])
        elif tag == "td":
            self._rows[-1].append("")
            self._cell = True
        elif tag == "data":
            self.values.append(dict(attrs)["value"] or "")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag != "td"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self._rows[-1][-1] += data


def report_data(run: dict[str, Any]) -> style.ReportData:
    return style.ReportData(**{name: value for name, value in run.items() if name != "name"})


def write_report(run: dict[str, Any], directory: Path) -> None:
    page.write_report(report_data(run), run["name"], epath.Path(directory))


class Written(NamedTuple):
    """The report of one case."""

    case: str
    run: dict[str, Any]
    workdir: Path
    page: Page
    html: str


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, marks=[pytest.mark.slow] * (case == "1000 long names")) for case in CASES],
)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    run = made_run(**CASES[request.param])
    workdir = tmp_path_factory.mktemp("run")
    write_report(run, workdir)
    html = (workdir / "report.html").read_text()
    return Written(request.param, run, workdir, Page(html), html)


def test_every_figure_has_content_in_both_formats(written: Written) -> None:
    drawn = set(figures.FIGURES) - missing(written.case)
    assert {path.name for path in (written.workdir / "figures").iterdir()} == {
        f"{name}.{kind}" for name in drawn for kind in ("png", "svg")
    }
    for name in drawn:
        pixels = np.asarray(Image.open(written.workdir / "figures" / f"{name}.png").convert("L"))
        assert pixels.shape[1] == round(style.PAGE_INCHES * 60)
        assert 0.01 < np.mean(pixels < 250) < 0.9, name
        svg = ElementTree.parse(written.workdir / "figures" / f"{name}.svg").getroot()
        texts = [element for element in svg.iter() if element.tag.endswith("}text")]
        assert len(texts) >= 5, name


def test_page_is_self_contained(written: Written) -> None:
    assert len(written.html) < 5_000_000
    assert "@import" not in written.html
    assert "url(" not in written.html
    drawn = set(figures.FIGURES) - missing(written.case)
    images = [attrs for tag, attrs in written.page.tags if tag == "img"]
    assert len(images) == len(drawn)
    for tag, attrs in written.page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        if attrs.get("href") in ("latents.html", "explorer.html"):  # the pages beside it, the only links
            continue
        for attribute in ("href", "srcset", "action", "data", "poster", "background"):
            assert attribute not in attrs, (tag, attribute)
        if "src" in attrs:
            assert tag == "img"
    files = {(written.workdir / "figures" / f"{name}.svg").read_bytes() for name in drawn}
    for attrs in images:
        kind, encoded = str(attrs["src"]).split(",")
        assert kind == "data:image/svg+xml;base64"
        assert len(str(attrs["alt"])) > 40
        svg = base64.b64decode(encoded)
        assert svg in files
        for element in ElementTree.parse(io.BytesIO(svg)).iter():
            for attribute, value in element.attrib.items():
                if attribute.endswith("href"):
                    assert value.startswith(("#", "data:image/png;base64,"))
                assert "url(http" not in value


def test_names_are_escaped(written: Written) -> None:
    assert [tag for tag, _ in written.page.tags].count("script") == 1
    assert [tag for tag, _ in written.page.tags].count("b") == 1  # our own
    assert "a <run>" in written.page.text
    if "classes" in written.run["summary"]:
        shown = [row[0] for row in written.page.tables["classes-table"] if row]
        assert shown == [row["name"] for row in written.run["summary"]["classes"]]


def test_the_origin_of_an_imported_autoencoder_is_told(written: Written) -> None:
    provenance = written.run["summary"]["sae"]["provenance"]
    assert ("provenance" in written.page.tables) == (provenance is not None)
    if provenance:
        told = dict(written.page.tables["provenance"])
        assert told["library"] == "saelens 6.54.12"
        assert told["file"] == f"/data/<sae> (SHA-256 {16 * 'a'})"
        assert told["made for the model"] == "<b>gpt2</b>"
        assert told["reads"].startswith("blocks.1.hook_resid_post (the input of layer 2); here it reads the input of")
        assert told["dataset"] == "unknown"
        assert told["check"] == provenance["doubts"][0]


def test_numbers_are_the_summarys(written: Written) -> None:
    summary, strategies = written.run["summary"], written.run["config"].steer.strategies
    steering, layer, page = summary["steering"], summary["last_layer"], written.page
    rows = [row for row in page.tables["strategies"] if row]
    assert [row[0] for row in rows[1::2]] == [name.replace("_", " ") for name in strategies]
    shown = [steering["unsteered"]]
    for name in strategies:
        shown += [steering[name], steering[name]["by_predicted_class"]]
    for row, result in zip(rows, shown, strict=True):
        assert row[2].startswith(f"{result['usage']:.3f}")
        assert row[3].startswith(f"{100 * result['accuracy']:.1f}%")
        if "alpha_per_class" in result:
            per_class = result["alpha_per_class"]
            assert row[1].replace("\u2212", "-") == f"{result['alpha']:g}"
            assert row[5:7] == [str(result["classes_saved"]), f"{100 * result['total_macs_share']:.1f}%"]
            assert row[7:] == (["", "", ""] if per_class is None else [
                f"{per_class['usage']:.3f}", f"{100 * per_class['accuracy']:.1f}%", str(per_class["classes_saved"])
            ])  # fmt: skip
    sizes = [row for row in page.tables["sizes"] if row]
    for row, size in zip(sizes, layer["by_size"], strict=True):
        assert [row[2], row[3], row[5]] == [f"{100 * size[key]:.1f}%" for key in ("random", "fixed", "oracle")]
        sublayers = " " + ", ".join(size["sublayers"]) if "sublayers" in size else ""
        assert row[4] == "{" + ", ".join(f"h{head}" for head in size["heads"]) + "}" + sublayers
    if "classes" in summary:
        table = [row for row in page.tables["classes-table"] if row]
        for row, result in zip(table, summary["classes"], strict=True):
            assert row[1:6] == [
                str(result["images"]), f"{result['usage_before']:.3f}", f"{result['usage_after']:.3f}",
                f"{100 * result['accuracy_before']:.1f}%", f"{100 * result['accuracy_after']:.1f}%",
            ]  # fmt: skip
            names = [name.removeprefix("h") for name in report_data(written.run).gate_names]
            assert row[7] == " ".join(names[gate] for gate in result["heads_after"])
            assert row[8] == ("yes" if result["saved"] else "no")
        shown = [row for name, rows in page.tables.items() if name.startswith("claims-") for row in rows if row]
        assert len(shown) == len(summary["claims"])
        for claim in summary["claims"]:
            (row,) = (row for row in shown if row[0].startswith(claim["claim"]))
            assert row[-1] == word_verdict(claim["claim"], claim["interval"], claim["holds"])
            assert ("usages that both reach" in row[0]) == ("usages" in claim)
    for name, sentence in SENTENCES.items():
        assert (f"{sentence}." in page.text) == (name in strategies)
    exact = [float(value) for value in page.values]
    for value in (
        layer["all_on"], layer["all_off"], layer["oracle"]["usage"], layer["best_fixed"]["accuracy"],
        summary["gated_accuracy"], summary["dense_accuracy"], summary["dense_control_accuracy"],
        summary["sae"]["explained_variance"],
        *steering["unsteered"]["usage_ci"], *(end for name in strategies for end in steering[name]["accuracy_ci"]),
        *(claim["value"] for claim in summary.get("claims", ()) if claim["value"] is not None),
    ):  # fmt: skip
        assert value in exact
    assert written.run["config"].steer.mode in page.text


def test_compute_is_told_if_more_than_heads_is_gated(written: Written) -> None:
    page, m = written.page, report_data(written.run)
    compute = "compute" in CASES[written.case]
    assert ("layer-macs" in page.tables) == ("budgets-table" in page.tables) == compute
    assert ("Where the text speaks of heads" in page.text) == compute
    if not compute:
        return
    assert m.gates is not None
    assert m.gate_names == ["h0", "h1", "h2", "h3", "attn", "MLP"]
    steering = written.run["summary"]["steering"]
    rows = [row for row in page.tables["layer-macs"] if row]
    assert [row[2] for row in rows] == [f"{100 * row['macs_share']:.1f}%" for row in steering.values()]
    front = [row for row in page.tables["budgets-table"] if row]
    assert [row[:2] for row in front] == [
        [f"{row['budget']:g}", f"{100 * row['share']:.1f}%"] for row in written.run["summary"]["front"]["rows"]
    ]
    dense = count_dense_macs(m.config, len(m.dataset.class_names))
    share = float(m.gates.macs.mean(dtype=float)) / dense
    assert any(float(value) == pytest.approx(share) for value in page.values)


def _boxes(axis: Axis) -> list[Any]:
    """List the boxes of an axis's visible tick labels."""
    low, high = sorted(axis.get_view_interval())
    margin = 1e-6 * (high - low)
    labels = [
        tick.label1 for tick in axis.get_major_ticks() if low - margin <= tick.get_loc() <= high + margin
    ]  # fmt: skip
    return [label.get_window_extent() for label in labels if label.get_visible() and label.get_text()]


@pytest.mark.parametrize("name", figures.FIGURES)
def test_labels_neither_overlap_nor_leave_the_figure(written: Written, name: str) -> None:
    with style.apply_style():
        figure = figures.FIGURES[name](report_data(written.run))
        if figure is None:
            assert name in missing(written.case)
            return
        figure.draw_without_rendering()
        frame = figure.bbox
        for axes in figure.findobj(lambda artist: isinstance(artist, Axes)):
            for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
                boxes = _boxes(axis)
                for i, box in enumerate(boxes):
                    assert frame.x0 - 1 <= box.x0
                    assert box.x1 <= frame.x1 + 1
                    for other in boxes[:i]:
                        apart_x = max(box.x0, other.x0) - min(box.x1, other.x1)
                        apart_y = max(box.y0, other.y0) - min(box.y1, other.y1)
                        assert max(apart_x, apart_y) > -1, axis
            texts = [text for text in (*axes.texts, axes.title, axes._left_title) if text.get_text()]
            for text in texts:
                box = text.get_window_extent()
                assert frame.x0 - 1 <= box.x0, text
                assert box.x1 <= frame.x1 + 1, text
                assert frame.y0 - 1 <= box.y0, text
                assert box.y1 <= frame.y1 + 1, text


def test_two_renderings_are_the_same_bytes(tmp_path: Path) -> None:
    run = made_run(classes=5, heads=3, seeds=2, per_class=4, compute=True)
    for name in ("first", "second"):
        write_report(run, tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file())
    assert len(files) == 2 * len(figures.FIGURES) + 1
    for path in files:
        assert (tmp_path / "first" / path).read_bytes() == (tmp_path / "second" / path).read_bytes(), path


def test_a_figure_of_an_earlier_report_is_removed(tmp_path: Path) -> None:
    stale = tmp_path / "figures" / "savers.png"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    write_report(made_run(strategies=("random",), heads=2, seeds=1, rows=False), tmp_path)
    assert not stale.exists()


def test_figures_leave_matplotlib_as_it_was() -> None:
    import matplotlib

    before = {name: matplotlib.rcParams[name] for name in matplotlib.rcParams}
    figures.render_figure(report_data(made_run(heads=2, seeds=1)), "sae")
    assert {name: matplotlib.rcParams[name] for name in before} == before


def test_a_strategy_without_latents_has_no_figure_of_them() -> None:
    """Its row is filled up with -1 if another one has latents, and is empty otherwise."""
    run = made_run(heads=2, seeds=1, strategies=("gate_bias", "random"))
    data = report_data(run)
    latents = data.arrays["latents"].copy()
    latents[list(data.colours).index("gate_bias")] = -1
    for filled in (latents, latents[..., :0]):
        assert figures.draw_latents(data._replace(arrays=data.arrays | {"latents": filled})) is None
    assert figures.draw_latents(data) is not None


@pytest.mark.parametrize(
    ("value", "digits", "text"), [(0.5, 3, "+0.500"), (-0.25, 1, "\u22120.2"), (-0.0001, 2, "+0.00"), (3, 0, "+3")]
)
def test_format_signed(value: float, digits: int, text: str) -> None:
    assert style.format_signed(value, digits) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [("pine tree", "pine tree"), ("a\nb\x07 c", "a b c"), ("abcdefghijklmnopqrstuvwxyz", "abcdefghijk\u2026wxyz")],
)
def test_shorten(name: str, text: str) -> None:
    assert style.shorten(name) == text


def test_spread_labels_keeps_the_order_and_moves_only_close_neighbours() -> None:
    places = style.spread_labels([0.5, 0.51, 0.1, 0.52, 0.9], 0.1)
    assert places[2] == pytest.approx(0.1)
    assert places[4] == pytest.approx(0.9)
    assert np.array(places)[[0, 1, 3]] == pytest.approx([0.41, 0.51, 0.61], abs=0.002)


@pytest.mark.parametrize("name", ["report.html", "latents.html", "explorer.html", "figures/front.png"])
def test_pages_replace_no_file_of_another_program(tmp_path: Path, name: str) -> None:
    page.check_output(epath.Path(tmp_path))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "mine.png").write_text("the user's")
    page.check_output(epath.Path(tmp_path))  # a name that is none of the report's
    (tmp_path / name).write_text("the user's")
    with pytest.raises(
        HeadSteerError, match=f"{name}: exists, and HeadSteer did not write it; choose another --output"
    ):
        page.check_output(epath.Path(tmp_path))


def test_pages_are_written_again_with_their_figures(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "front.png").write_text("an earlier report's")
    (tmp_path / "latents.html").write_text('<meta name="generator" content="HeadSteer">')
    page.check_output(epath.Path(tmp_path))
