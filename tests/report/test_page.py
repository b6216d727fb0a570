"""The report: complete, self-contained, escaped, legible, the summary's numbers, the same bytes twice."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axis import Axis
from PIL import Image

from headsteer_jax.analysis.summary import summarise
from headsteer_jax.config import Config, DataConfig, ModelConfig, ReportConfig, SAEConfig, SteerConfig
from headsteer_jax.data.dataset import Dataset, LazyImages, Split
from headsteer_jax.report import figures, page, style
from headsteer_jax.steer.sweep import make_alpha_grid
from headsteer_jax.steer.table import gates_to_pattern, pattern_to_gates
from headsteer_jax.steer.tally import class_counts, pack_bits

HOSTILE = (
    '<b>bold</b> & "quoted"',
    "it's 50% & <script>alert(1)</script>",
    "$x$ and $y_1$",
    "\u9905\u7acb\nwith a bell\x07",
)
LONG = tuple(f"great crested something number {c}, also called the thing" for c in range(1000))


def made_layers() -> dict[str, Any]:
    """What layers.json holds, of three layers that never were."""
    rows = [
        {
            "layer": layer, "alphas": [0.0, 1.0, 4.0], "usage": [0.8, 0.7, 0.6], "accuracy": [0.9, 0.9, 0.88],
            "alpha": float(layer), "usage_before": 0.8, "usage_after": 0.8 - 0.05 * layer, "accuracy_before": 0.9,
            "usage_change_ci": [-0.06 * layer, -0.04 * layer], "accuracy_after": 0.9 - 0.002 * layer,
            "accuracy_change_ci": [-0.01, 0.005], "all_off": 0.3 * layer, "explained_variance": 0.9,
            "dead_fraction": 0.01,
        }
        for layer in (1, 2, 3)
    ]  # fmt: skip
    whole = {key: value for key, value in rows[0].items() if key not in ("layer", "all_off", "explained_variance")}
    whole.pop("dead_fraction")
    return {"layers": rows, "together": whole, "images": 200}


def made_run(
    classes: int = 10, heads: int = 6, seeds: int = 3, per_class: int = 6, strategies: tuple[str, ...] = (),
    alphas: tuple[float, ...] = (-2.0, 0.5, 1.0, 2.0, 4.0), only: int = 0, related: bool = True, channels: int = 1,
    rows: bool = True, names: tuple[str, ...] = (), bootstrap: int = 40, lazy: bool = False, by_layer: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """A run that never was: gates and answers drawn so that `class` saves heads, `global` loses accuracy.

    Args:
      only: steer only the first so many classes; 0: all.

    Returns:
      write_report's arguments, but for workdir.
    """
    rng = np.random.default_rng(0)
    class_names = names + tuple(f"{c:02d}" for c in range(len(names), classes))
    config = Config(
        data=DataConfig(channels=channels, mean=(0.0,) * channels, std=(1.0,) * channels, image_size=20),
        model=ModelConfig(width=8 * heads, heads=heads),
        sae=SAEConfig(seeds=seeds, expansion=4, k=4),
        steer=SteerConfig(
            strategies=strategies or ("class", "global", "random", "matched_random", "gate_aligned"),
            alphas=alphas, latents=4, bootstrap=bootstrap, classes=class_names[:only], tolerance=0.02,
        ),
        report=ReportConfig(top_images=5, dpi=60),
    )  # fmt: skip
    alphas_A, patterns = make_alpha_grid(config.steer), pattern_to_gates(np.arange(2**heads), heads)
    important = rng.normal(0.6, 0.5, (classes, heads))  # what each head adds to the class's answer
    important[:, 0] = 0.9
    open_by = rng.normal(1.2, 0.5, (classes, heads)) + 0.5 * important
    pull = {
        "class": important - 1.1,
        "gate_aligned": 1.4 * (important - 0.9),
        "global": rng.normal(-0.6, 0.8, heads) * np.ones((classes, 1)),
    }
    arrays: dict[str, np.ndarray] = {
        "strategies": np.array(config.steer.strategies), "named_by": np.array(("true", "predicted")),
        "alphas": alphas_A, "class_names": np.array(class_names), "subset": np.arange(2**heads),
    }  # fmt: skip
    for split in ("validation", "test"):
        labels = np.repeat(np.arange(only or classes), per_class).astype(np.int32)
        noise = rng.normal(0, 0.7, (len(labels), heads))
        gate_logits = open_by[labels] + noise
        luck = rng.logistic(0, 1, len(labels))
        right_NP = (1.2 * (important[labels] @ (patterns.T - 0.4)) + 0.8 + luck[:, None]) > 0
        wrong = (labels + rng.integers(1, classes, len(labels))) % classes
        table = np.where(right_NP, labels[:, None], wrong[:, None]).astype(np.int16)
        pattern = np.asarray(gates_to_pattern(gate_logits > 0))
        rank = np.arange(len(labels))
        before = table[rank, pattern]
        steered = np.zeros((len(config.steer.strategies), seeds, 2, len(alphas_A), len(labels)), np.uint16)
        for g, name in enumerate(config.steer.strategies):
            for s, y in np.ndindex(seeds, 2):
                push = pull.get(name, rng.normal(-0.25, 0.4, (classes, heads))) + rng.normal(0, 0.1, (classes, heads))
                named = labels if y == 0 else before
                logits = (
                    gate_logits
                    + np.sign(alphas_A)[:, None, None] * np.abs(alphas_A[:, None, None]) ** 0.7 * push[named]
                )
                steered[g, s, y] = np.asarray(gates_to_pattern(logits > 0))
        predictions = table[rank, steered]
        right, was = predictions == labels, before == labels
        count = lambda values, labels=labels: class_counts(values, labels, classes)  # noqa: E731
        arrays |= {
            f"{split}_labels": labels,
            f"{split}_count": np.bincount(labels, minlength=classes),
            f"{split}_pattern": pattern,
            f"{split}_prediction": before,
            f"{split}_table": table,
            f"{split}_unsteered_correct": count(was),
            f"{split}_unsteered_heads_on": count(pattern_to_gates(pattern, heads).T).T,
            f"{split}_unsteered_right": pack_bits(was),
            f"{split}_right": pack_bits(right),
            f"{split}_gates": pack_bits(np.moveaxis(pattern_to_gates(steered, heads), -1, -2)),
            f"{split}_correct": count(right),
            f"{split}_gained": count(right & ~was),
            f"{split}_lost": count(~right & was),
            f"{split}_heads_on": np.stack([count((steered >> head) & 1) for head in range(heads)], axis=-1),
        }
    latents = config.latents
    frequency = np.clip(10 ** rng.normal(-1.6, 0.7, (seeds, latents)), 0, 1) * (rng.random((seeds, latents)) > 0.05)
    chosen = rng.integers(0, max(latents // 3, 8), (len(config.steer.strategies), seeds, classes, 4)).astype(np.int32)
    train = np.repeat(np.arange(classes), 6).astype(np.int32)
    side = config.data.image_size
    y, x = np.mgrid[:side, :side] / side
    pictures = 127 + 120 * np.sin(6 * (x + y * (1 + train[:, None, None] % 5)) + train[:, None, None])
    images = np.repeat(pictures[..., None], channels, axis=3) * np.linspace(0.5, 1, channels)
    images = images.astype(np.uint8)
    held = (
        images
        if not lazy
        else LazyImages(lambda places: iter(images[places]), np.arange(len(images)), images.shape[1:])
    )
    arrays |= {
        "latents": chosen, "weights": np.ones(chosen.shape, np.float32), "frequency": frequency,
        "class_frequency": np.clip(frequency[0] * rng.exponential(2, (classes, latents)), 0, 1).astype(np.float32),
        "top_images": rng.integers(0, len(train), (latents, 5)).astype(np.int32),
        "top_activations": np.sort(rng.normal(1, 0.8, (latents, 5)), axis=1)[:, ::-1].astype(np.float32),
        "sae_mse": (0.05 + np.exp(-np.arange(15) / 3)[:, None] * rng.uniform(0.8, 1, (1, seeds))).astype(np.float32),
        "sae_l0": np.full((15, seeds), 4.0, np.float32),
        "sae_dead": (0.2 * np.exp(-np.arange(15) / 4)[:, None] * rng.uniform(0.5, 1, (1, seeds))).astype(np.float32),
    }  # fmt: skip
    related_CC = (np.arange(classes)[:, None] // 5 == np.arange(classes) // 5) & ~np.eye(classes, dtype=bool)
    if related:
        arrays["related"] = related_CC
    member = np.zeros((len(config.steer.strategies), seeds, classes, latents), np.float32)
    np.put_along_axis(member, chosen, 1, axis=-1)
    by_name = dict(zip(config.steer.strategies, member, strict=True))
    if "class" in by_name:
        arrays["overlap_class_class"] = by_name["class"] @ by_name["class"].swapaxes(1, 2) / 4
        if "global" in by_name:
            arrays["overlap_global_class"] = np.einsum("SF,SCF->SC", by_name["global"][:, 0], by_name["class"]) / 4
    numbers, extra = summarise(arrays, config)
    health = {"mse": 0.0512, "explained_variance": 0.912, "l0": 3.9, "dead_fraction": 0.034}
    health |= {"gate_agreement": 0.97, "accuracy": 0.91, "mse_residual": 0.0312, "dense_fraction": 0.02, "twins": 0.01}
    health |= {"max_cosine": 0.43, "class_selectivity": 0.61, "accuracy_residual": 0.87, "kl": 0.123}
    stability = {"seeds": 0.71 if seeds > 1 else None, "same_start": 0.93, "random": 0.38}
    points = [{"k": k, "learning_rate": rate, "explained_variance": 0.9 - rate, "dead_fraction": rate}
              for k in (2, 4) for rate in (1e-3, 4e-3)]  # fmt: skip
    best = {str(k): {"learning_rate": 1e-3, "explained_variance": 0.9, "dead_fraction": 0.01} for k in (2, 4)}
    summary = {
        "dense_accuracy": 0.923, "dense_control_accuracy": 0.931, "layer_usage": [0.8, 0.7, 0.75], **numbers,
        "sae": health | {"latents": latents, "k": 4, "layer": config.sae_layer, "seeds": [health] * seeds}
        | {"stability": stability},
        "grid": {"best": best, "rows": points, "epochs": 9, "latents": latents} if by_layer else None,
        "seconds": {"train": 120.25, "sae": 31.5, "steer": 12.0}, "peak_memory_bytes": 3 * 2**30,
        "versions": {"python": "3.12.0", "jax": "0.10.2", "device": "cpu:0"}, "config": config.model_dump(mode="json"),
        "by_layer": made_layers() if by_layer else None,
    }  # fmt: skip
    split = Split(held, train)
    return {
        "config": config, "name": "a <run>", "summary": summary, "arrays": arrays | extra,
        "dataset": Dataset(split, split, split, class_names, related_CC if related else None),
        "rows": made_rows() if rows else [],
    }  # fmt: skip


def made_rows() -> list[dict[str, Any]]:
    """metrics.jsonl as training with three gated layers writes it."""
    rows: list[dict[str, Any]] = []
    for phase, first, last in (("dense", 0, 1200), ("gated", 1200, 1800), ("dense_control", 1200, 1800)):
        for step in range(25, last - first + 1, 25):
            done = (first + step) / 1800
            row = {"phase": phase, "step": step, "cross_entropy": 0.8 + 3 * np.exp(-5 * done)}
            row["train_accuracy"] = 0.95 - np.exp(-4 * done) - 0.03 * (phase == "gated")
            row["loss"] = row["cross_entropy"] + 0.1
            if phase == "gated":
                share = min(1.0, step / 372)
                row["usage_target"], row["gate_noise"] = 1 - 0.25 * share, 1 - share
                row["usage_sampled"] = [row["usage_target"] - 0.02 * layer for layer in range(3)]
                row["usage_thresholded"] = [1 - 0.25 * share**4 - 0.01 * layer for layer in range(3)]
            rows.append(row)
            if step % 300 == 0:
                usage = {"validation_usage": [0.76, 0.74, 0.77]} if phase == "gated" else {}
                rows.append({"phase": phase, "step": step, "validation_accuracy": row["train_accuracy"] - 0.04} | usage)
    return rows


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
    "1000 long names": {
        "names": LONG, "classes": 1000, "per_class": 2, "seeds": 1, "strategies": ("class", "random"),
        "alphas": (1.0, 2.0), "heads": 3, "rows": False,
    },
}  # fmt: skip
MISSING = {  # what a case cannot show
    "no class strategy, 3 heads, 4 classes steered, no training rows": {"savers", "overlap", "training"},
    "1000 long names": {"training"},
}


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


class Written(NamedTuple):
    """A case's report."""

    case: str
    run: dict[str, Any]
    workdir: Path
    page: Page
    html: str


@pytest.fixture(scope="module", params=CASES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    run = made_run(**CASES[request.param])
    workdir = tmp_path_factory.mktemp("run")
    page.write_report(workdir=workdir, **run)
    html = (workdir / "report.html").read_text()
    return Written(request.param, run, workdir, Page(html), html)


def test_every_figure_has_content_in_both_formats(written: Written) -> None:
    drawn = set(figures.FIGURES) - MISSING.get(written.case, set())
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
    drawn = set(figures.FIGURES) - MISSING.get(written.case, set())
    images = [attrs for tag, attrs in written.page.tags if tag == "img"]
    assert len(images) == len(drawn)
    for tag, attrs in written.page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        if attrs.get("href") == "latents.html":  # the page beside it, the only link
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
            each = result["alpha_per_class"]
            assert row[1].replace("\u2212", "-") == f"{result['alpha']:g}"
            assert row[5:] == [
                str(result["classes_saved"]), f"{each['usage']:.3f}", f"{100 * each['accuracy']:.1f}%",
                str(each["classes_saved"]),
            ]  # fmt: skip
    sizes = [row for row in page.tables["sizes"] if row]
    for row, size in zip(sizes, layer["by_size"], strict=True):
        assert [row[2], row[3], row[5]] == [f"{100 * size[key]:.1f}%" for key in ("random", "fixed", "oracle")]
        assert row[4] == "{" + ", ".join(f"h{head}" for head in size["heads"]) + "}"
    if "classes" in summary:
        table = [row for row in page.tables["classes-table"] if row]
        for row, one in zip(table, summary["classes"], strict=True):
            assert row[1:6] == [
                str(one["images"]), f"{one['usage_before']:.3f}", f"{one['usage_after']:.3f}",
                f"{100 * one['accuracy_before']:.1f}%", f"{100 * one['accuracy_after']:.1f}%",
            ]  # fmt: skip
            assert row[7] == " ".join(map(str, one["heads_after"]))
            assert row[8] == ("yes" if one["saved"] else "no")
        verdicts = [row[-1] for row in page.tables["claims-table"] if row]
        words = {True: "holds", False: "does not hold", None: "not reached"}
        assert verdicts == [words[claim["holds"]] for claim in summary["claims"]]
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


def _boxes(axis: Axis) -> list[Any]:
    """Where an axis's visible tick labels are."""
    low, high = sorted(axis.get_view_interval())
    margin = 1e-6 * (high - low)
    labels = [
        tick.label1 for tick in axis.get_major_ticks() if low - margin <= tick.get_loc() <= high + margin
    ]  # fmt: skip
    return [label.get_window_extent() for label in labels if label.get_visible() and label.get_text()]


@pytest.mark.parametrize("name", figures.FIGURES)
def test_labels_neither_overlap_nor_leave_the_figure(written: Written, name: str) -> None:
    arguments = {key: value for key, value in written.run.items() if key != "name"}
    with style.apply_style():
        figure = figures.FIGURES[name](style.ReportData(**arguments))
        if figure is None:
            assert name in MISSING[written.case]
            return
        figure.draw_without_rendering()
        whole = figure.bbox
        for axes in figure.findobj(lambda artist: isinstance(artist, Axes)):
            for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
                boxes = _boxes(axis)
                for i, box in enumerate(boxes):
                    assert whole.x0 - 1 <= box.x0
                    assert box.x1 <= whole.x1 + 1
                    for other in boxes[:i]:
                        apart_x = max(box.x0, other.x0) - min(box.x1, other.x1)
                        apart_y = max(box.y0, other.y0) - min(box.y1, other.y1)
                        assert max(apart_x, apart_y) > -1, axis
            texts = [text for text in (*axes.texts, axes.title, axes._left_title) if text.get_text()]
            for text in texts:
                box = text.get_window_extent()
                assert whole.x0 - 1 <= box.x0, text
                assert box.x1 <= whole.x1 + 1, text
                assert whole.y0 - 1 <= box.y0, text
                assert box.y1 <= whole.y1 + 1, text


def test_two_renderings_are_the_same_bytes(tmp_path: Path) -> None:
    run = made_run()
    for name in ("one", "two"):
        page.write_report(workdir=tmp_path / name, **run)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 2 * len(figures.FIGURES) + 1
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path


def test_a_figure_of_an_earlier_report_goes(tmp_path: Path) -> None:
    stale = tmp_path / "figures" / "savers.png"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    page.write_report(workdir=tmp_path, **made_run(strategies=("random",), heads=2, seeds=1, rows=False))
    assert not stale.exists()


def test_figures_leave_matplotlib_as_it_was() -> None:
    import matplotlib

    before = {name: matplotlib.rcParams[name] for name in matplotlib.rcParams}
    arguments = {key: value for key, value in made_run(heads=2, seeds=1).items() if key != "name"}
    figures.render_figure(style.ReportData(**arguments), "sae")
    assert {name: matplotlib.rcParams[name] for name in before} == before


@pytest.mark.parametrize(
    ("value", "digits", "text"), [(0.5, 3, "+0.500"), (-0.25, 1, "\u22120.2"), (-0.0001, 2, "+0.00"), (3, 0, "+3")]
)
def test_signed(value: float, digits: int, text: str) -> None:
    assert style.format_signed(value, digits) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [("pine tree", "pine tree"), ("a\nb\x07 c", "a b c"), ("abcdefghijklmnopqrstuvwxyz", "abcdefghijk\u2026wxyz")],
)
def test_short(name: str, text: str) -> None:
    assert style.shorten(name) == text


def test_spread_keeps_order_gap_and_what_is_apart_already() -> None:
    places = style.spread_labels([0.5, 0.51, 0.1, 0.52, 0.9], 0.1)
    assert places[2] == pytest.approx(0.1)
    assert places[4] == pytest.approx(0.9)
    assert np.array(places)[[0, 1, 3]] == pytest.approx([0.41, 0.51, 0.61], abs=0.002)
