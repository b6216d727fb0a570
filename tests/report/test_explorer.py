"""explorer.html: its arrays against the package's own, and the page in a browser against the package's counts."""

import base64
import importlib.util
import json
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import CLASSES, random_sae, steer_config, trained_model
from etils import epath
from helpers import ROOT

from headsteer_jax.analysis.summary import summarise
from headsteer_jax.analysis.sweep_file import to_arrays, to_dataset
from headsteer_jax.data.dataset import Dataset, Split
from headsteer_jax.model.compute import ImageGates
from headsteer_jax.model.passes import run_over_split
from headsteer_jax.report import explorer
from headsteer_jax.sae.autoencoder import Autoencoder, fit_scaling
from headsteer_jax.sae.residuals import make_residual_program
from headsteer_jax.sae.store import RunData
from headsteer_jax.steer.catalogue import STRATEGIES, per_class_strategy
from headsteer_jax.steer.gates import LayerGates, pattern_to_gates
from headsteer_jax.steer.steering import GateProgram, Steering
from headsteer_jax.steer.strategies import Choice, Strategy
from headsteer_jax.steer.sweep import run_sweep

CHROMIUM = "/usr/bin/chromium"
NAMES = (
    "<script>document.title = 'run'</script>",
    "\"quotes\" & 'others' &amp;",
    "😀 emoji",
    "עברית (rtl)",
    "</script><b>bold",
    "${x} `tick` \\n",
    "plain",
)
STRATEGY_NAMES = ("class", "matched_random", "mean_difference", "image_latents", "image_random")


class Made(NamedTuple):
    """A made run, swept, and its page."""

    run: RunData
    arrays: dict[str, np.ndarray]
    readings: explorer.TestReadings
    x: np.ndarray  # [N, D] of the test images
    file: Path


def make_split(count: int, seed: int) -> Split:
    """Make random images of all classes by turns."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    return Split(images, (np.arange(count) % CLASSES).astype(np.int32))


def make_page(directory: Path, own: Mapping[str, Strategy] = MappingProxyType({}), **steer: Any) -> Made:
    """Sweep a model with random parameters, by built-in strategies and some of the test's own, and write its page."""
    alphas = (-2.0, -0.5, 0.0, 0.5, 2.0, 6.0)
    config = steer_config(**{"strategies": STRATEGY_NAMES, "alphas": alphas, "least_validation": 1} | steer)
    trained, train = trained_model(config), make_split(140, 1)
    related = np.arange(CLASSES)[:, None] // 2 == np.arange(CLASSES) // 2
    dataset = Dataset(train, make_split(70, 2), make_split(105, 3), NAMES, related & ~np.eye(CLASSES, dtype=bool))
    layer, width = config.sae_layer, config.model.width
    program = make_residual_program(trained, (layer,), "cls")
    x_train, x_test = (run_over_split(program, trained.params, split, "x")[0][:, 0] for split in (train, dataset.test))
    weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(random_sae(seed, width, 2 * width) for seed in (0, 1)))
    autoencoders = Autoencoder(weights, fit_scaling(lambda: [x_train], config.sae), config.sae.k)
    run = RunData(trained, dataset, autoencoders, x_train)
    result = run_sweep(run, {name: STRATEGIES[name] for name in config.steer.strategies} | dict(own))
    arrays = to_arrays(to_dataset(result, summarise(result, config)[1]))
    readings, file = explorer.read_test_images(run, x_test), directory / "explorer.html"
    explorer.write_explorer(epath.Path(file), "a <run> & more", config, dataset, arrays, readings)
    return Made(run, arrays, readings, x_test, file)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_page(tmp_path_factory.mktemp("explorer"))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_page(tmp_path_factory.mktemp("recorded"), target="residual", strategies=("class", "random"))


def read_data(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a page's JSON and unpack its arrays, without the package."""
    text = file.read_text("utf-8")
    (header,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    (blob,) = re.findall(r'<script type="text/plain" id="blob">(.*?)</script>', text, re.DOTALL)
    data, content, arrays = json.loads(header), zlib.decompress(base64.b64decode(blob)), {}
    for entry in data["index"]:
        dtype, size, planes = np.dtype(entry["type"]), int(np.prod(entry["shape"])), entry["planes"]
        stored = np.frombuffer(content, np.uint8, size * planes, entry["offset"]).reshape(planes, size)
        bytes_ = np.zeros((size, dtype.itemsize), np.uint8)
        bytes_[:, dtype.itemsize - planes :] = stored.T
        arrays[entry["name"]] = bytes_.view(dtype).reshape(entry["shape"])
    return data, arrays


def test_the_arrays_come_back(made: Made) -> None:
    data, arrays = read_data(made.file)
    order = arrays["image"]
    assert np.array_equal(np.sort(order), np.arange(105))
    assert np.all(np.diff(made.arrays["test_labels"][order]) >= 0)
    for name, stored in (
        ("labels", "labels"),
        ("prediction", "prediction"),
        ("answers", "table"),
        ("pattern", "pattern"),
    ):
        assert np.array_equal(arrays[name], made.arrays[f"test_{stored}"][order]), name
    assert np.array_equal(arrays["gate_logits"], made.readings.gate_logits[order])
    z_NF = np.asarray(made.run.autoencoders.member(0).encode(made.x))[order]
    ends = np.cumsum(arrays["active_count"])
    for n, (begin, end) in enumerate(zip(ends - arrays["active_count"], ends, strict=True)):
        latents = np.cumsum(arrays["active_latents"][begin:end])
        assert np.array_equal(latents, np.flatnonzero(z_NF[n]))
        assert arrays["active_values"][begin:end] == pytest.approx(z_NF[n, latents], rel=2**-16)
    assert data["classes"] == list(NAMES)
    assert [row["kind"] for row in data["strategies"]] == ["latents", "latents", "directions", "recorded", "recorded"]


def test_bounds_are_rounded_up(made: Made) -> None:
    data, arrays = read_data(made.file)
    for name, exact in (("size", made.readings.size[arrays["image"]]), ("reach", made.readings.effect.size)):
        stored = arrays[name] * np.array(data["rounding"][name])
        assert np.all(stored >= exact * (1 - 1e-9)), name
        assert np.all(stored <= exact + np.array(data["rounding"][name]) * 1.001), name


def test_stored_arrays_give_the_counts_of_the_sweep(made: Made) -> None:
    """Steer with nothing but the page's arrays, in NumPy, and compare with the sweep's counts at its alphas."""
    data, a = read_data(made.file)
    labels, C = a["labels"].astype(int), CLASSES
    z_NF, ends = np.zeros((len(labels), len(a["strength"]))), np.cumsum(a["active_count"])
    for n, (begin, end) in enumerate(zip(ends - a["active_count"], ends, strict=True)):
        z_NF[n, np.cumsum(a["active_latents"][begin:end])] = a["active_values"][begin:end]
    for g, name in enumerate(("class", "matched_random")):
        for y, by in enumerate((labels, a["prediction"].astype(int))):
            shift_NS = (a["weights"][g] * a["strength"][a["latents"][g]])[by]
            chosen_NS = a["latents"][g][by].astype(int)
            z_NS = np.take_along_axis(z_NF, chosen_NS, axis=1)
            for i, alpha in enumerate(data["alphas"]):
                change_NS = np.maximum(z_NS + alpha * shift_NS, 0) - z_NS
                m_NG = a["gate_logits"] + np.einsum("NS,NSG->NG", change_NS, a["effect"].astype(float)[chosen_NS])
                assert np.abs(m_NG).min() > 1e-5  # none is in doubt
                pattern_N = (m_NG > 0) @ (1 << np.arange(m_NG.shape[1]))
                right_N = a["answers"][np.arange(len(labels)), pattern_N] == labels
                counts = np.bincount(labels[right_N], minlength=C)
                assert np.array_equal(counts, made.arrays["test_correct"][g, 0, y, i]), (name, alpha)
                on_CG = np.stack([(m_NG > 0)[labels == c].sum(axis=0) for c in range(C)])
                assert np.array_equal(on_CG, made.arrays["test_heads_on"][g, 0, y, i]), (name, alpha)


def test_neighbours_are_the_largest_cosines() -> None:
    decoder = np.random.default_rng(0).standard_normal((12, 4))
    living = np.arange(12) % 3 != 0
    latents, cosines = explorer.find_neighbours(decoder, living)
    unit = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
    for f in range(12):
        others = [j for j in np.argsort(-(unit @ unit[f])) if j != f and living[j]][: explorer.NEIGHBOURS]
        assert latents[f].tolist() == others
        assert cosines[f] == pytest.approx(unit[others] @ unit[f], abs=1e-6)
    latents, cosines = explorer.find_neighbours(decoder, np.arange(12) < 2)
    assert latents[0].tolist() == [1, 0, 0, 0, 0]
    assert cosines[0, 1:].tolist() == [0, 0, 0, 0]


def write_thinned(made: Made, file: Path) -> None:
    """Write the page of the same run as if its arrays and thumbnails were too large."""
    config, dataset = made.run.trained.config, made.run.dataset
    stored = explorer.pack_arrays(explorer.explorer_data(config, dataset, made.arrays, made.readings)[1]).blob
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explorer, "ARRAY_BYTES", len(stored) * 3 // 4)
        patch.setattr(explorer, "THUMBNAIL_BYTES", 700)
        explorer.write_explorer(epath.Path(file), "run", config, dataset, made.arrays, made.readings)


def test_a_large_run_is_thinned_and_the_page_says_so(made: Made, tmp_path: Path) -> None:
    write_thinned(made, tmp_path / "e.html")
    text, (_, arrays) = (tmp_path / "e.html").read_text(), read_data(tmp_path / "e.html")
    assert len(arrays["image"]) < 105
    assert f"this page holds {len(arrays['image'])} of the 105 test images" in text
    shown = int((arrays["tile"] >= 0).sum())
    assert 0 < shown < len(arrays["image"])
    assert f"it has thumbnails of {shown} images" in text


def gate_patches(made: Made, file: Path) -> np.ndarray:
    """Write the page of the same run as if its patches had gates; return the kept patches, [N, patches] bool."""
    config = made.run.trained.config
    config = config.model_copy(update={"gate": config.gate.model_copy(update={"kinds": ("heads", "tokens")})})
    layers = len(config.layers_with("tokens"))
    kept_NLP = np.random.default_rng(8).random((105, layers, 4)) < 0.6
    gates = ImageGates({"tokens": kept_NLP}, np.zeros(105, np.float32), made.arrays["test_prediction"])
    dataset = made.run.dataset
    explorer.write_explorer(epath.Path(file), "run", config, dataset, made.arrays, made.readings, gates)
    return kept_NLP[:, config.layers_with("tokens").index(config.sae_layer)]


def test_the_page_holds_the_kept_patches(made: Made, tmp_path: Path) -> None:
    kept_NP = gate_patches(made, tmp_path / "e.html")
    _, arrays = read_data(tmp_path / "e.html")
    bits = np.unpackbits(arrays["kept"], axis=1, count=4, bitorder="little").astype(bool)
    assert np.array_equal(bits, kept_NP[arrays["image"]])


def test_kept_patches_are_those_of_the_steered_classes(tmp_path: Path) -> None:
    made = make_page(tmp_path, strategies=("class",), classes=(NAMES[1], NAMES[4]))
    kept_NP = gate_patches(made, tmp_path / "e.html")[np.isin(made.run.dataset.test.labels, (1, 4))]
    _, arrays = read_data(tmp_path / "e.html")
    assert len(arrays["image"]) == 30
    bits = np.unpackbits(arrays["kept"], axis=1, count=4, bitorder="little").astype(bool)
    assert np.array_equal(bits, kept_NP[arrays["image"]])


def test_the_page_loads_nothing_and_holds_no_name_as_html(made: Made) -> None:
    text = made.file.read_text("utf-8")
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'" in text
    assert not re.search(r'(src|href)="(?!#)', text)
    assert "<title>a &lt;run&gt; &amp; more: HeadSteer explorer</title>" in text
    for name in ("<script>document", "</script><b>"):
        assert name not in text


# in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"there is no {CHROMIUM} (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Open a page; at the end of the test there must have been no error in its console."""
    problems: list[str] = []
    context = browser.new_context(viewport={"width": 1100, "height": 900})

    def open_page(file: Path, hash_: str = "") -> Any:
        tab = context.new_page()
        tab.on(
            "console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None
        )
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.goto(file.as_uri() + hash_)
        tab.wait_for_selector("html[data-first-ms]", state="attached")
        return tab

    yield open_page
    context.close()
    assert not problems


def wait_until(tab: Any, expression: str, argument: object = None) -> None:
    """Wait until a JavaScript expression is true, without the `eval` that the page's policy forbids to Playwright."""
    deadline = time.monotonic() + 60
    while not tab.evaluate(expression, argument):
        assert time.monotonic() < deadline, expression
        tab.wait_for_timeout(20)


def shown_counts(tab: Any) -> tuple[int, list[int], int]:
    """Read the counts of the current setting: right answers, images on which each gate is open, flagged images."""
    shown = tab.evaluate("({...document.querySelector('#numbers tr.now').dataset})")
    return int(shown["right"]), [int(on) for on in shown["on"].split()], int(shown["flagged"])


def count_by_gate(
    made: Made, program: GateProgram, choice: Choice, by: np.ndarray, alpha: float, classes: list[int]
) -> tuple[int, list[int]]:
    """Count what the page shows through the gate itself and the sweep's table."""
    steering = Steering(made.run.autoencoders.member(0), made.readings.strength, choice)
    (pattern_N,) = program.patterns_on_grid(steering, made.x, by, np.array([alpha]))
    labels = made.arrays["test_labels"]
    chosen = np.isin(labels, classes)
    right = made.arrays["test_table"][np.arange(len(labels)), pattern_N] == labels
    return int(right[chosen].sum()), pattern_to_gates(pattern_N[chosen], len(made.arrays["gates"])).sum(axis=0).tolist()


def test_random_settings_count_as_the_gate_itself(made: Made, visit: Any) -> None:
    tab, rng, program = visit(made.file), np.random.default_rng(5), GateProgram(made.run.trained)
    labels, prediction, none = made.arrays["test_labels"], made.arrays["test_prediction"], np.zeros((CLASSES, 0))
    for number in range(100):
        g, y, alpha = number % 3, int(rng.integers(2)), float(np.float32(round(float(rng.uniform(-3, 8)), 2)))
        c = "all" if number % 4 == 0 else int(rng.integers(CLASSES))
        classes = list(range(CLASSES)) if c == "all" else [c]
        if g == 2:
            directions = made.arrays["directions"][2, 0]
            choice = Choice(none.astype(np.int32), none.astype(np.float32), directions)
        else:
            choice = Choice(made.arrays["latents"][g, 0], made.arrays["weights"][g, 0])
        by = prediction if y else labels
        query = f"class={c}&strategy={STRATEGY_NAMES[g]}&by={('true', 'predicted')[y]}&alpha={alpha}"
        tab.evaluate("hash => { location.hash = hash }", query)
        tab.wait_for_selector(f"html[data-drawn*='{query}']", state="attached")
        right, on, flagged = shown_counts(tab)
        expected = count_by_gate(made, program, choice, by, alpha, classes)
        assert flagged == 0, query  # a float32 within rounding of 0 is rare among so few images
        assert (right, on) == expected, query


def test_what_fills_up_the_choices_of_a_strategy_is_not_taken_for_latent_0(tmp_path: Path, visit: Any) -> None:
    many = per_class_strategy(lambda _, label: (np.arange(label, label + 6), np.ones(6)), "many")
    made = make_page(tmp_path, {"many": many}, strategies=("class",))
    latents_CS = made.arrays["latents"][0, 0]
    chosen = [set(row[row >= 0].tolist()) for row in latents_CS]
    assert (latents_CS < 0).any()
    for c in range(CLASSES):
        tab = visit(made.file, f"#view=class&class={c}")
        shares = tab.locator("#class-body .bars").first.locator("span").all_text_contents()[2::3]
        expected = [len(chosen[c] & chosen[other]) / len(chosen[c]) for other in range(CLASSES) if other != c]
        assert shares == [f"{share:.1%}" for share in sorted(expected, reverse=True) if share > 0], c


def test_latents_by_hand_count_as_the_gate_itself(made: Made, visit: Any) -> None:
    tab = visit(made.file, "#strategy=hand&alpha=1.5&class=all")
    assert tab.locator("#none-picked").is_visible()
    tab.fill("#find", "7")
    tab.locator("#found button").first.click()
    tab.fill("#find", "11")
    tab.locator("#found button").first.click()
    weight = tab.get_by_label("weight of latent 11")
    weight.fill("2.5")
    tab.get_by_label("change the sign of latent 7").click()
    wait_until(tab, "location.hash.includes('latents=7%3A-1%2C11%3A2.5')")
    program = GateProgram(made.run.trained)
    choice = Choice(
        np.tile([7, 11], (CLASSES, 1)).astype(np.int32), np.tile([-1, 2.5], (CLASSES, 1)).astype(np.float32)
    )
    labels = made.arrays["test_labels"]
    for alpha in (1.5, -4.0):
        tab.fill("#alpha", str(alpha))
        assert shown_counts(tab)[:2] == count_by_gate(made, program, choice, labels, alpha, list(range(CLASSES)))
    tab.get_by_label("remove latent 7").click()
    choice = Choice(choice.latents[:, 1:], choice.weights[:, 1:])
    assert shown_counts(tab)[:2] == count_by_gate(made, program, choice, labels, -4.0, list(range(CLASSES)))


def test_the_slider_moves_everything_and_the_keyboard_moves_the_slider(made: Made, visit: Any) -> None:
    tab = visit(made.file, "#class=2&strategy=class&alpha=0")
    unsteered = tab.evaluate("({...document.querySelector('#numbers tr[data-setting=unsteered]').dataset})")
    right, on, _ = shown_counts(tab)
    assert (str(right), " ".join(map(str, on))) == (unsteered["right"], unsteered["on"])
    tab.focus("#slider")
    tab.keyboard.press("End")
    wait_until(tab, "document.querySelector('#alpha').value === '6'")
    index = made.arrays["alphas"].tolist().index(6.0)
    assert shown_counts(tab)[0] == made.arrays["test_correct"][0, 0, 0, index, 2]
    assert shown_counts(tab)[1] == made.arrays["test_heads_on"][0, 0, 0, index, 2].tolist()
    assert tab.locator("#heads .head small").all_text_contents() == [str(count) for count in shown_counts(tab)[1]]
    marks = tab.locator("#tiles .tile.right").count()
    assert marks == shown_counts(tab)[0]
    wait_until(tab, "document.querySelector('#spoken').textContent.startsWith('Alpha 6: accuracy')")


def test_the_curve_ends_where_the_sweep_does(made: Made, visit: Any) -> None:
    """The drawn steps end at the counts of the sweep at the largest and the smallest alpha."""
    tab = visit(made.file, "#class=all&strategy=class")
    paths = tab.evaluate("[...document.querySelectorAll('#plot path[fill=none]')].map(path => path.getAttribute('d'))")
    usage, accuracy = (np.array(re.findall(r"[MV](?:[\d.]+ )?([\d.-]+)", path), float) for path in paths[-2:])
    shown = {"correct": accuracy, "heads_on": usage}
    for name, values in shown.items():
        for end, index in ((values[0], 0), (values[-1], -1)):
            counts = made.arrays[f"test_{name}"][0, 0, 0, index]
            share = counts.sum() / (105 * (counts.shape[1] if counts.ndim == 2 else 1))
            assert end == pytest.approx(240 - 240 * share, abs=0.06), name


def test_every_state_is_an_address_and_back_leads_back(made: Made, visit: Any) -> None:
    tab = visit(made.file)
    tab.select_option("#class", "3")
    tab.select_option("#strategy", "1")
    tab.locator("#tiles .tile").nth(2).click()
    assert tab.locator("#image").is_visible()
    tab.click("#to-latent")
    address, heading = tab.url, tab.locator("#latent-body h2").first.text_content()
    again = visit(made.file, "#" + address.split("#")[1])
    assert again.locator("#latent-body h2").first.text_content() == heading
    assert again.url == address
    for expected in ("view=steer.*image=", "class=3&strategy=matched_random", "class=3&strategy=class"):
        tab.go_back()
        wait_until(tab, "pattern => new RegExp(pattern).test(location.hash)", expected)
    assert tab.input_value("#class") == "3"
    assert tab.locator("#image").is_hidden()
    visit(made.file, "#view=nowhere&class=-1&strategy=none&alpha=x&latents=9999:1,a:b&image=1e9&latent=-3")


def history_length(tab: Any) -> int:
    """Count the entries of a tab's history."""
    return int(tab.evaluate("history.length"))


def test_an_edit_of_a_field_is_one_entry_of_the_history(made: Made, visit: Any) -> None:
    tab = visit(made.file, "#view=steer&class=2&strategy=hand&by=true&alpha=0&latents=7%3A1%2C11%3A1")
    tab.locator("#slider").scroll_into_view_if_needed()
    start, box = history_length(tab), tab.locator("#slider").bounding_box()
    y = box["y"] + box["height"] / 2
    tab.mouse.move(box["x"] + box["width"] * 0.5, y)
    tab.mouse.down()
    for share in (0.6, 0.7):
        tab.mouse.move(box["x"] + box["width"] * share, y)
        tab.wait_for_timeout(250)  # at rest, but still held
    tab.mouse.up()
    dragged = float(tab.input_value("#alpha"))
    assert dragged != 0
    assert history_length(tab) == start + 1
    tab.locator("#alpha").fill("0.5")
    tab.wait_for_timeout(250)
    tab.locator("#alpha").press_sequentially("5", delay=20)
    field = tab.get_by_label("weight of latent 11")
    field.fill("2")
    field.press_sequentially(".25", delay=60)
    tab.focus("#slider")
    for _ in range(5):
        tab.keyboard.press("ArrowRight")
        tab.wait_for_timeout(50)
    stepped = float(tab.input_value("#alpha"))
    assert history_length(tab) == start + 4
    tab.wait_for_timeout(1200)
    tab.keyboard.press("ArrowLeft")
    wait_until(tab, f"Number(document.querySelector('#alpha').value) < {stepped}")
    assert history_length(tab) == start + 5
    for alpha, weight in ((stepped, 2.25), (0.55, 2.25), (0.55, 1), (dragged, 1), (0, 1)):
        tab.go_back()
        wait_until(tab, "alpha => Number(document.querySelector('#alpha').value) === alpha", alpha)
        wait_until(tab, "w => document.querySelectorAll('#picked input')[1].valueAsNumber === w", weight)


def test_links_are_of_the_state_that_is_shown(made: Made, visit: Any) -> None:
    tab = visit(made.file, "#view=class&class=3&strategy=class&alpha=1")
    tab.click("#to-steer")
    tab.fill("#alpha", "2.5")
    tab.select_option("#strategy", "1")
    tab.fill("#alpha", "2.5")
    for view in ("class", "latent", "class"):
        tab.click(f"#to-{view}")
        links = tab.evaluate(f"[...document.querySelectorAll('#{view}-body a')].map(element => element.hash)")
        assert links
        assert all("strategy=matched_random" in link and "alpha=2.5" in link for link in links), view


def focused(tab: Any) -> str:
    """Read the identifier of what has the focus, or its text."""
    return str(tab.evaluate("document.activeElement.id || document.activeElement.textContent"))


def test_the_focus_follows_what_opens(made: Made, visit: Any) -> None:
    tab = visit(made.file, "#class=3&strategy=class&alpha=1")
    tab.locator("#tiles .tile").nth(2).press("Enter")
    assert focused(tab) == "image"
    tab.locator("#detail a").first.press("Enter")
    assert focused(tab) == tab.locator("#latent-body h2").first.text_content()
    tab.locator("#latent-body .bars a").first.press("Enter")
    assert focused(tab) == tab.locator("#class-body h2").first.text_content()
    tab.get_by_text("Steer its images").press("Enter")
    assert focused(tab) == "Steer"
    tab.click("#to-latent")
    tab.locator("#latent-body .tiles a").first.press("Enter")
    assert focused(tab) == "image"
    tab.click("#to-latent")
    tab.get_by_text("Steer with it by hand").press("Enter")
    assert focused(tab) == "hand-title"


def test_the_focus_stays_among_the_latents_by_hand(made: Made, visit: Any) -> None:
    tab = visit(made.file, "#strategy=hand&latents=7:1,11:1,13:1")
    for latent, then in ((11, "remove latent 13"), (13, "remove latent 7")):
        tab.get_by_label(f"remove latent {latent}").press("Enter")
        assert tab.evaluate("document.activeElement.getAttribute('aria-label')") == then
    tab.keyboard.press("Enter")
    assert focused(tab) == "find"


def test_what_is_drawn_is_also_text(made: Made, visit: Any) -> None:
    tab = visit(made.file, "#class=2&strategy=class&alpha=2")
    unsteered = tab.evaluate("document.querySelector('#numbers tr[data-setting=unsteered]').dataset.on").split()
    spoken = tab.locator("#heads .head .spoken").all_text_contents()
    assert spoken == [f"{int(on) / 15:.1%} without steering" for on in unsteered]
    latent = int(np.argmax(np.bincount(made.readings.active.indices)))
    tab = visit(made.file, f"#view=latent&latent={latent}")
    counts = tab.locator("#latent-body .spoken tbody td").all_text_contents()
    bars = tab.evaluate("[...document.querySelectorAll('#latent-body rect title')].map(title => title.textContent)")
    assert [f"{number} images" for number in counts] == bars
    assert sum(map(int, counts)) == (made.readings.active.indices == latent).sum()


def test_answers_under_many_subsets_are_grouped(made: Made, visit: Any, tmp_path: Path) -> None:
    text, file = made.file.read_text("utf-8"), tmp_path / "many.html"
    assert "MOST_PATTERNS = 256" in text
    file.write_text(text.replace("MOST_PATTERNS = 256", "MOST_PATTERNS = 4"), "utf-8")
    for number in (3, 4, 9):
        tab = visit(file, f"#class=all&strategy=class&alpha=1&image={number}")
        assert tab.locator("#detail .answers").count() == 0
        lines = tab.locator("#detail table").last.locator("tr").all()
        rows = [line.locator("th, td").all_text_contents() for line in lines]
        table, expected = made.arrays["test_table"][number], {}
        assert rows[0] == ["Answer", "Subsets", "heads in them"]
        for answer in np.unique(table):
            patterns = np.flatnonzero(table == answer)
            sizes = sorted({int(pattern).bit_count() for pattern in patterns})
            mark = "✓ " if answer == made.arrays["test_labels"][number] else ""
            expected[mark + NAMES[answer]] = (str(len(patterns)), sizes)
        for name, subsets, shown in rows[1:]:
            runs = [[int(end) for end in run.split("\u2013")] for run in shown.split(", ")]
            sizes = [size for run in runs for size in range(run[0], run[-1] + 1)]
            assert expected.pop(name) == (subsets, sizes)
        assert not expected


def test_a_thinned_page_compares_the_same_images(made: Made, visit: Any, tmp_path: Path) -> None:
    write_thinned(made, tmp_path / "e.html")
    _, arrays = read_data(tmp_path / "e.html")
    # the benchmark compares over the same images
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "benchmarks/explorer.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert np.array_equal(benchmark.read_held_images(tmp_path / "e.html"), arrays["image"])
    tab = visit(tmp_path / "e.html", "#class=all&strategy=class&alpha=0")
    cells = [row.locator("td").all_text_contents() for row in tab.locator("#numbers tbody tr").all()[:2]]
    assert cells[0] == cells[1]
    assert cells[0][0].endswith(f"of {len(arrays['image'])}")
    layer = LayerGates(made.run.trained.config, made.run.trained.config.sae_layer)
    macs = layer.macs(made.arrays["test_pattern"][arrays["image"]]).mean() / layer.dense_macs
    assert cells[0][2].startswith(f"{macs:.1%}")
    tab = visit(tmp_path / "e.html", "#class=all&strategy=image_latents&alpha=0.5")
    names = tab.locator("#numbers tbody th").all_text_contents()
    assert names[0] == "unsteered"
    assert names[1] == "image latents, \u03b1 = 0.5, of all 105 images"
    assert names[2] == "image random (control), of all 105 images"


def test_images_in_doubt_are_shown(made: Made, visit: Any, tmp_path: Path) -> None:
    order = np.flatnonzero(made.arrays["test_labels"] == 2)
    logits, chosen = made.readings.gate_logits.copy(), order[[1, 6, 7]]
    sign = np.where(pattern_to_gates(made.arrays["test_pattern"][chosen], logits.shape[1]), 1, -1)
    logits[chosen] = sign * np.float32(1e-9)
    readings = made.readings._replace(gate_logits=logits)
    config, dataset = made.run.trained.config, made.run.dataset
    explorer.write_explorer(epath.Path(tmp_path / "e.html"), "run", config, dataset, made.arrays, readings)
    tab = visit(tmp_path / "e.html", "#class=2&strategy=class&alpha=1e-9")
    assert shown_counts(tab)[2] == 3
    shown = tab.locator("#flagged-images a")
    assert shown.all_text_contents() == [f"image {number}" for number in chosen]
    shown.nth(1).press("Enter")
    assert focused(tab) == "image"
    assert tab.locator("#image-title").text_content() == f"Image {chosen[1]}"
    tab.fill("#alpha", "0")
    assert shown.count() == 0


def test_names_are_shown_as_they_are(made: Made, visit: Any) -> None:
    tab = visit(made.file, "#view=class&class=4")
    assert tab.locator("#class-body h2").first.text_content() == NAMES[4]
    assert tab.locator("#class-of-view option").all_text_contents() == list(NAMES)
    tab.click("#to-steer")
    assert tab.locator("#class option").all_text_contents()[1:] == list(NAMES)
    assert tab.title() == "a <run> & more: HeadSteer explorer"
    assert tab.locator("main b", has_text="bold").count() == 0
    tab.locator("#tiles .tile").first.click()
    assert tab.locator("#detail b").first.text_content() == NAMES[4]


def test_a_class_has_the_accuracy_of_every_subset(made: Made, visit: Any) -> None:
    tab = visit(made.file, "#view=class&class=1")
    rows = tab.evaluate("[...document.querySelectorAll('details tr[data-pattern]')].map(row => ({...row.dataset}))")
    chosen = made.arrays["test_labels"] == 1
    right_P = (made.arrays["test_table"][chosen] == 1).sum(axis=0)
    assert {int(row["pattern"]): int(row["right"]) for row in rows} == dict(enumerate(right_P.tolist()))


def test_an_image_shows_its_answers_and_its_kept_patches(made: Made, visit: Any, tmp_path: Path) -> None:
    kept_NP = gate_patches(made, tmp_path / "e.html")
    number = int(np.flatnonzero(made.arrays["test_labels"] == 2)[3])
    tab = visit(tmp_path / "e.html", f"#class=2&strategy=class&alpha=1&image={number}")
    classes = tab.evaluate("[...document.querySelectorAll('#detail .patches i')].map(patch => patch.className)")
    assert [name == "kept" for name in classes] == kept_NP[number].tolist()
    titles = tab.evaluate("[...document.querySelectorAll('#detail .answers > span')].map(answer => answer.title)")
    table = made.arrays["test_table"][number]
    assert [title.split(": ", 1)[1] for title in titles] == [NAMES[answer] for answer in table]
    spoken = [text.split(": ")[0] for text in tab.locator("#detail .answers > span").all_text_contents()]
    assert [text.removesuffix(", which runs now") for text in spoken] == [title.split(": ")[0] for title in titles]
    running = [text.endswith(", which runs now") for text in spoken]
    outlined = tab.evaluate("[...document.querySelectorAll('#detail .answers > span')].map(e => e.matches('.now'))")
    assert running == outlined
    assert sum(running) == 1
    assert "the outlined one runs now" in str(tab.locator("#detail").text_content())
    kept = int(kept_NP[number].sum())
    assert f"keeps {kept} of 4 patches" in str(tab.locator("#detail").text_content())
    margins = tab.locator("#detail tbody").first.locator("td:nth-child(2)").all_text_contents()
    logits = [float(text.replace("\u2212", "-")) for text in margins]
    assert logits == pytest.approx(made.readings.gate_logits[number].tolist(), abs=6e-4)


def test_recorded_settings_are_all_that_a_run_by_the_suffix_shows(recorded: Made, visit: Any) -> None:
    tab = visit(recorded.file, "#class=2&strategy=class&alpha=2.2")
    assert "the block itself reads the steered residual" in str(tab.locator("#recorded").text_content())
    assert tab.locator("#strategy option").all_text_contents() == ["class", "random (control)"]
    index = recorded.arrays["alphas"].tolist().index(2.0)  # the nearest
    right, on, _ = shown_counts(tab)
    assert right == recorded.arrays["test_correct"][0, 0, 0, index, 2]
    assert on == recorded.arrays["test_heads_on"][0, 0, 0, index, 2].tolist()
    tab.focus("#slider")
    tab.keyboard.press("ArrowRight")
    wait_until(tab, "document.querySelector('#alpha').value === '6'")
    for view in ("class", "latent"):
        tab.click(f"#to-{view}")
        assert tab.locator(f"#{view}-body .card").count() >= 3
        text = str(tab.locator(f"#{view}-body").text_content())
        assert "what mode “add” would contribute to each gate's logit at \u03b1 = 1, to first order" in text
        assert "hat \u03b1 = 1 adds" not in text
    tab = visit(recorded.file, "#class=2&strategy=class&alpha=2&image=2")
    text = str(tab.locator("#detail").text_content())
    assert "Its answer under each of the 8 subsets" in text
    assert "the outlined one" not in text


def test_a_strategy_that_chooses_for_each_image_shows_its_recorded_settings(made: Made, visit: Any) -> None:
    tab = visit(made.file, "#class=all&strategy=image_latents&alpha=0.5&by=predicted")
    index = made.arrays["alphas"].tolist().index(0.5)
    assert shown_counts(tab)[0] == made.arrays["test_correct"][3, 0, 1, index].sum()
    rows = tab.evaluate("[...document.querySelectorAll('#numbers tbody tr')].map(row => ({...row.dataset}))")
    assert [row["setting"] for row in rows[2:]] == ["image random (control)", "matched random (control)"]
    for row, g in zip(rows[2:], (4, 1), strict=True):
        assert int(row["right"]) == made.arrays["test_correct"][g, 0, 1, index].sum()
    assert tab.locator("#control-name").text_content() == "both under image random, a control"
    assert tab.locator("#plot path[stroke-dasharray='2 4']").count() == 2
    tab = visit(made.file, "#class=all&strategy=class&alpha=0.5")
    assert "image random" not in str(tab.locator("#numbers").text_content())


def test_a_narrow_and_a_dark_page_fit(made: Made, visit: Any) -> None:
    tab = visit(made.file, "#class=1&image=1")
    tab.set_viewport_size({"width": 390, "height": 800})
    tab.emulate_media(color_scheme="dark")
    for view in ("steer", "class", "latent"):
        tab.click(f"#to-{view}")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390, view
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 22, 21)"
