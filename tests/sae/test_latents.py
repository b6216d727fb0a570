"""The profile of an autoencoder's latents: every array against brute force in float64; the page holds exactly these."""

import base64
import html
import io
import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from builders import random_sae
from PIL import Image

from headsteer_jax.config import Config, DataConfig, ModelConfig, ReportConfig, SAEConfig
from headsteer_jax.data.dataset import Dataset, LazyImages, Split
from headsteer_jax.report.latents import CLASSES_SHOWN, THUMBNAIL, write_latents_page
from headsteer_jax.sae import autoencoder as s
from headsteer_jax.sae import latents as profile
from headsteer_jax.sae.residuals import LabelledResiduals, ResidualsInMemory

N, D, F, C, H, K = 83, 6, 10, 4, 3, 6
TOKENS = {"cls": 1, "patches": 4, "all": 5}
SCALING = s.Scaling(np.full(D, 0.5, np.float32), np.float32(0.7))
HOSTILE = ("</script><b>bold</b>", 'it\'s "quoted" & <!-- <script>', "\u9905\u7acb\u2028\nbell\x07", "$x$ {{ y }}")


class Parts(ResidualsInMemory):
    """Residuals that come a few at a time, not in whole images."""

    def chunks(self) -> Iterator[np.ndarray]:
        cuts = [1, 2, 9, 10, 40, 41, 200]
        return iter(np.split(self.x, [cut for cut in cuts if cut < len(self.x)]))


def residuals(tokens: str) -> tuple[np.ndarray, np.ndarray]:
    """[N, T', D] and the CLS tokens' [N, D]."""
    rng = np.random.default_rng(5)
    x = (0.5 + rng.standard_normal((N, TOKENS[tokens], D))).astype(np.float32)
    return x, x[:, 0] if tokens != "patches" else rng.standard_normal((N, D)).astype(np.float32)


def labels() -> np.ndarray:
    """Of C classes, one of which has no image."""
    return (np.arange(N) * 7 % (C - 1)).astype(np.int32)


def autoencoder(tokens: str) -> s.SAEWeights:
    """Latent 4 never fires; latent 7 does on few images."""
    sae = random_sae(3, D, F)
    a_N = np.asarray((s.scale_input(SCALING, residuals(tokens)[0]) - sae.b_d) @ (200 * sae.W_e[7])).max(axis=1)
    third, second = np.unique(a_N)[-3:-1]
    return sae._replace(
        W_e=sae.W_e.at[7].multiply(200.0),
        b_e=sae.b_e.at[4].set(-100.0).at[7].set(-(second + third) / 2),
        threshold=sae.threshold.at[7].set(0.0),
    )


GATE = np.random.default_rng(8).standard_normal((D, H))


def profile_of(tokens: str, k: int | None, source: type[ResidualsInMemory] = ResidualsInMemory) -> profile.Arrays:
    x, x_cls = residuals(tokens)
    split = LabelledResiduals(source(x.reshape(-1, D)), tokens, x_cls, labels(), C)  # type: ignore[arg-type]
    return profile.profile_latents(s.Autoencoder(autoencoder(tokens), SCALING, k), split, GATE, K)


@pytest.mark.parametrize("rows", [7, 4096])  # images that are encoded at once: 7 or 1; all
@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_array_by_brute_force(tokens: str, k: int | None, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "ROWS_AT_ONCE", rows)
    arrays, exact = profile_of(tokens, k), s.SAEWeights(*(np.asarray(a, np.float64) for a in autoencoder(tokens)))
    x, x_cls = residuals(tokens)
    encode = np.vectorize(
        lambda x_D: reference.encode(exact, (x_D - 0.5) * np.float64(SCALING.scale), k), signature="(d)->(f)"
    )
    z, classes, T = encode(x.astype(np.float64)), labels(), TOKENS[tokens]
    image = z.max(axis=1)
    fires = image > 0
    assert not fires[:, 4].any()
    assert 0 < fires[:, 7].sum() < K  # fewer than K images

    expected: dict[str, np.ndarray] = {
        "frequency": fires.mean(axis=0),
        "strength": np.array([v[v > 0].mean() if (v > 0).any() else 0 for v in z.reshape(-1, F).T]),
        "class_counts": np.stack([fires[classes == c].sum(axis=0) for c in range(C)]),
    }
    means = np.stack([image[classes == c].mean(axis=0) if (classes == c).any() else np.zeros(F) for c in range(C)])
    expected["class_means"] = means
    largest = means.max(axis=0)
    elsewhere = (means.sum(axis=0) - largest) / (C - 1)
    expected["selectivity"] = np.divide(largest - elsewhere, largest + elsewhere, out=np.zeros(F), where=largest > 0)
    W, living = exact.W_d, np.flatnonzero(fires.any(axis=0))
    expected["cosine"] = np.zeros(F)
    for f in living:
        expected["cosine"][f] = max(W[f] @ W[g] / np.linalg.norm(W[f]) / np.linalg.norm(W[g]) for g in living if g != f)
    # the effect of adding a latent at its strength, by adding it
    x_0 = np.random.default_rng(1).standard_normal(D)
    expected["effect"] = np.stack(
        [(x_0 + expected["strength"][f] * W[f] / np.float64(SCALING.scale)) @ GATE - x_0 @ GATE for f in range(F)]
    )
    if tokens != "cls":
        expected["token_frequency"] = (z > 0).mean(axis=(0, 1))
        expected["cls_frequency"] = (encode(x_cls.astype(np.float64)) > 0).mean(axis=0)

    images, activations = np.zeros((F, K), int), np.zeros((F, K))
    patches = np.zeros((F, K, T))
    for f in range(F):
        order = sorted(np.flatnonzero(fires[:, f]), key=lambda n: (-image[n, f], n))[:K]  # of equal ones the earlier
        images[f, : len(order)], activations[f, : len(order)] = order, image[order, f]
        patches[f, : len(order)] = z[order, :, f]
    expected |= {"top_images": images, "top_activations": activations}
    if tokens != "cls":
        expected["top_patches"] = patches

    assert set(arrays) == set(expected)
    kinds = {"class_counts": np.int32, "top_images": np.int32, "top_patches": np.float16}
    for name, values in expected.items():
        assert arrays[name].dtype == kinds.get(name, np.float32), name
        tolerance = 1e-3 if name == "top_patches" else 1e-5
        np.testing.assert_allclose(arrays[name], values, rtol=tolerance, atol=tolerance, err_msg=name)
    assert arrays["top_activations"].flags.c_contiguous


@pytest.mark.parametrize("rows", [7, 4096])
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_first_of_images_that_tie_comes_first(tokens: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "ROWS_AT_ONCE", rows)
    rng, T = np.random.default_rng(0), TOKENS[tokens]
    x, W = rng.integers(-1, 2, (N, T, D)), rng.integers(-1, 2, (F, D))  # sums of these are exact
    zero = np.zeros(F, np.float32)
    sae = s.SAEWeights(*(np.asarray(a, np.float32) for a in (W, zero, W, zero[:D], zero)))  # type: ignore[arg-type]
    flat = x.reshape(-1, D).astype(np.float32)
    plain = s.Scaling(zero[:D], np.float32(1))
    split = LabelledResiduals(ResidualsInMemory(flat), tokens, flat[::T], labels(), C)  # type: ignore[arg-type]
    arrays = profile.profile_latents(s.Autoencoder(sae, plain, None), split, GATE, K)
    image = np.maximum(x @ W.T, 0).max(axis=1)
    for f in range(F):
        order = sorted(np.flatnonzero(image[:, f]), key=lambda n: (-image[n, f], n))[:K]
        assert arrays["top_images"][f, : len(order)].tolist() == order
        assert arrays["top_activations"][f, : len(order)].tolist() == image[order, f].tolist()
        if tokens != "cls":
            assert arrays["top_patches"][f, : len(order)].tolist() == np.maximum(x @ W.T, 0)[order, :, f].tolist()
    assert any(len(set(row)) < K for row in arrays["top_activations"].tolist())


@pytest.mark.parametrize("tokens", TOKENS)
def test_chunks_of_any_size_give_the_same_profile(tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "ROWS_AT_ONCE", 20)
    at_once, in_parts = profile_of(tokens, 3), profile_of(tokens, 3, Parts)
    for name, values in at_once.items():
        np.testing.assert_array_equal(values, in_parts[name], err_msg=name)


def test_fewer_images_than_places_and_a_single_living_latent() -> None:
    x, sae = residuals("cls")[0][:4, 0], random_sae(0, D, F)
    sae = sae._replace(b_e=sae.b_e.at[1:].set(-100.0).at[0].set(50.0))
    split = LabelledResiduals(ResidualsInMemory(x), "cls", x, labels()[:4], C)
    arrays = profile.profile_latents(s.Autoencoder(sae, SCALING, 2), split, GATE, 9)
    assert arrays["top_images"].shape == (F, 9)
    assert sorted(arrays["top_images"][0, :4]) == [0, 1, 2, 3]
    assert not arrays["top_activations"][0, 4:].any()
    assert not arrays["cosine"].any()
    assert arrays["frequency"].tolist() == [1] + [0] * (F - 1)


def made_dataset(channels: int = 3, side: int = 8, lazy: bool = False, names: tuple[str, ...] = HOSTILE) -> Dataset:
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (N, side, side, channels), dtype=np.uint8)
    held = LazyImages(lambda places: iter(images[places]), np.arange(N), images.shape[1:]) if lazy else images
    split = Split(held, labels())
    return Dataset(split, split, split, names)


def made_config(tokens: str, latents: int = 6, channels: int = 3, side: int = 8) -> Config:
    return Config(
        data=DataConfig(image_size=side, channels=channels, mean=(0.0,) * channels, std=(1.0,) * channels),
        model=ModelConfig(patch=side // 2, heads=H, width=2 * H),
        sae=SAEConfig(tokens=tokens, expansion=4, k=3),  # type: ignore[arg-type]
        report=ReportConfig(top_images=K, inside=latents),
    )


class Page(HTMLParser):
    """Tags, what is in the table's head, and the scripts' text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag == "th":
            self.headings.append("")

    def handle_data(self, data: str) -> None:
        last = self.tags[-1][0] if self.tags else ""
        if last == "script":
            self.scripts[-1] += data
        elif last == "button" and len(self.headings) and not self.headings[-1]:
            self.headings[-1] = data
        else:
            self.text += data


def written(tokens: str, directory: Path, name: str = "a <run>", **sizes: Any) -> tuple[str, Page, dict[str, Any]]:
    """The page's text, its parts, and the data in it."""
    latents = sizes.pop("latents", 6)
    picture = {key: sizes[key] for key in ("channels", "side") if key in sizes}
    file = directory / "latents.html"
    write_latents_page(
        file, name, profile_of(tokens, 3), made_dataset(**sizes), made_config(tokens, latents, **picture)
    )
    text = file.read_text("utf-8")
    page = Page(text)
    return text, page, json.loads(page.scripts[0])


@pytest.mark.parametrize("tokens", TOKENS)
def test_page_holds_the_arrays(tokens: str, tmp_path: Path) -> None:
    _, page, data = written(tokens, tmp_path)
    arrays = profile_of(tokens, 3)
    fires = np.flatnonzero(arrays["frequency"] > 0)
    assert sorted(data["latent"]) == fires.tolist()
    assert 4 not in data["latent"]
    assert f"{len(fires)} of {F} latents fire; dead latents are left out." in page.text
    selectivity = arrays["selectivity"][data["latent"]]
    assert (np.diff(selectivity) <= 0).all()
    more = ["Token frequency", "CLS frequency"] if tokens != "cls" else []
    assert page.headings == [
        "Latent", "Top images", "Classes", "Top class", "Its share", "Frequency", *more, "Strength", "Selectivity",
        "Nearest", *(f"h{head}" for head in range(H)),
    ]  # fmt: skip
    extra = ("token_frequency", "cls_frequency") if tokens != "cls" else ()
    for name in ("frequency", "strength", "selectivity", "cosine", *extra):
        np.testing.assert_allclose(data[name], arrays[name][data["latent"]], rtol=6e-4, err_msg=name)
    np.testing.assert_allclose(data["effect"], arrays["effect"][data["latent"]].T, rtol=6e-4)
    assert data["classes"] == list(HOSTILE)
    for latent, pairs, spread in zip(data["latent"], data["histogram"], data["spread"], strict=True):
        counts, means = (arrays[name][:, latent] for name in ("class_counts", "class_means"))
        order = [c for c, _ in pairs]  # of classes with as many images the one it is stronger on comes first
        assert order == sorted(np.flatnonzero(counts), key=lambda c: (-counts[c], -means[c]))[:CLASSES_SHOWN]
        assert [count for _, count in pairs] == sorted((c for c in counts.tolist() if c), reverse=True)[:CLASSES_SHOWN]
        assert all(counts[c] == count for c, count in pairs)
        assert spread == [np.count_nonzero(counts), counts.sum()]


@pytest.mark.parametrize("tokens", TOKENS)
def test_pictures_are_there_once_with_the_patches_that_drive_them(tokens: str, tmp_path: Path) -> None:
    _, _, data = written(tokens, tmp_path, channels=1, lazy=True)
    arrays, images = profile_of(tokens, 3), made_dataset(channels=1).train.images
    assert isinstance(images, np.ndarray)
    assert len(data["images"]) == 6
    assert len(set(data["thumbnails"])) == len(data["thumbnails"]) == len(data["image_class"])
    seen = set()
    for latent, row in zip(data["latent"], data["images"], strict=False):
        fires = arrays["top_activations"][latent] > 0
        assert len(row) == fires.sum()
        for place, (number, activation, *heat) in enumerate(row):
            seen.add(number)
            n = arrays["top_images"][latent, place]
            np.testing.assert_allclose(activation, arrays["top_activations"][latent, place], rtol=6e-4)
            assert data["image_class"][number] == labels()[n]
            kind, _, content = data["thumbnails"][number].partition(";base64,")
            assert kind in ("data:image/png", "data:image/jpeg")
            shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))), np.float64)
            assert np.abs(shown - images[n, ..., 0]).mean() < 6
            if tokens == "cls":
                assert not heat
                continue
            z = arrays["top_patches"][latent, place].astype(np.float64)
            cls, digits = heat
            patches = z[1:] if tokens == "all" else z
            assert cls is None if tokens == "patches" else cls == pytest.approx(z[0], rel=6e-4)
            top = float(arrays["top_activations"][latent, 0])
            assert [int(digit, 16) for digit in digits] == [min(15, math.ceil(15 * v / top)) for v in patches]
            assert len(digits) == data["grid"] ** 2
    assert seen == set(range(len(data["thumbnails"])))


def test_large_images_become_small(tmp_path: Path) -> None:
    _, _, data = written("cls", tmp_path, side=120)
    for uri in data["thumbnails"]:
        assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == (THUMBNAIL,) * 2


@pytest.mark.parametrize("tokens", TOKENS)
def test_page_is_self_contained_and_names_are_escaped(tokens: str, tmp_path: Path) -> None:
    text, page, data = written(tokens, tmp_path, name="</title><b>run</b>")
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2
    assert "b" not in tags
    assert "</title><b>run</b>: latents" in page.text
    assert data["classes"][0] == HOSTILE[0]
    for forbidden in ("http://", "https://", "url(", "@import", "<!--"):
        assert forbidden not in text, forbidden
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img"), tag
        for name in ("href", "src", "srcset", "action", "data", "poster", "background"):
            assert name not in attributes, (tag, name)
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "\u2028" not in text


def test_two_pages_are_the_same_bytes(tmp_path: Path) -> None:
    texts = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        texts.add(written("all", tmp_path / name)[0])
    assert len(texts) == 1


def test_an_autoencoder_without_living_latents(tmp_path: Path) -> None:
    arrays = {name: np.zeros_like(values) for name, values in profile_of("all", 3).items()}
    write_latents_page(tmp_path / "latents.html", "run", arrays, made_dataset(), made_config("all"))
    page = Page((tmp_path / "latents.html").read_text("utf-8"))
    assert f"0 of {F} latents fire; dead latents are left out." in page.text
    assert json.loads(page.scripts[0])["thumbnails"] == []


CLICKS = """
<script>
const shown = () => [...document.querySelectorAll("#latents tbody tr")].map(row => row.cells[0].textContent);
const seen = headings.map(heading => [0, 1].map(() => {
  heading.querySelector("button").click();
  return [heading.ariaSort, shown(), document.querySelectorAll("th[aria-sort]").length];
}));
const filtered = ["7", "QUOTED", "nothing"].map(text => {
  byId("filter").value = text;
  byId("filter").dispatchEvent(new Event("input"));
  return shown();
});
document.body.replaceChildren(make("pre", JSON.stringify({seen, filtered})));
</script>
</body>"""


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["cls", "all"])
def test_headings_sort_and_the_box_filters_in_a_browser(tokens: str, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    text, page, data = written(tokens, tmp_path, latents=3)
    (tmp_path / "clicked.html").write_text(text.replace("</body>", CLICKS), "utf-8")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000",
        "--dump-dom", f"file://{tmp_path / 'clicked.html'}",
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    result = json.loads(html.unescape(dom.partition("<pre>")[2].partition("</pre>")[0]))

    rows, names = range(len(data["latent"])), data["classes"]
    keys: dict[str, list[Any]] = {
        "Latent": data["latent"],
        "Top images": [data["images"][r][0][1] if r < 3 else None for r in rows],
        "Classes": [spread[0] for spread in data["spread"]],
        "Top class": [names[pairs[0][0]] for pairs in data["histogram"]],
        "Its share": [pairs[0][1] / spread[1] for pairs, spread in zip(data["histogram"], data["spread"], strict=True)],
        "Frequency": data["frequency"],
        "Token frequency": data.get("token_frequency", []),
        "CLS frequency": data.get("cls_frequency", []),
        "Strength": data["strength"],
        "Selectivity": data["selectivity"],
        "Nearest": data["cosine"],
    }
    keys |= {f"h{head}": values for head, values in enumerate(data["effect"])}
    for heading, clicks in zip(page.headings, result["seen"], strict=True):
        by_name = heading == "Top class"
        first = "ascending" if by_name or heading == "Latent" else "descending"
        assert [click[0] for click in clicks] == [first, {"ascending": "descending"}.get(first, "ascending")]
        for direction, shown, sorted_by in clicks:
            assert sorted_by == 1
            key = {str(latent): value for latent, value in zip(data["latent"], keys[heading], strict=True)}
            assert sorted(shown) == sorted(key)
            values = [key[latent] for latent in shown]
            known = [value for value in values if value is not None]
            assert values[: len(known)] == known  # those without images last
            if by_name:  # the order of names is the browser's
                assert len([i for i in rows if i and values[i] != values[i - 1]]) == len(set(values)) - 1
            else:
                assert known == sorted(known, reverse=direction == "descending")
    number, name, nothing = result["filtered"]
    assert number == ["7"]
    like = {str(latent) for latent, pairs in zip(data["latent"], data["histogram"], strict=True) if 1 in dict(pairs)}
    assert set(name) == like
    assert nothing == []
