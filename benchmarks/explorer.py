"""Steer random settings in explorer.html and in the package, and time the page; the last line is one JSON object.

    python benchmarks/explorer.py DIR [--page=explorer.html] [--data=PATH] [--settings=100]
    python benchmarks/explorer.py --made[=IMAGES] [--keep=FILE]

DIR is a finished run; its page is taken from there unless --page names another. In each setting the counts that a
browser shows, of right answers and of the images on which each gate is open, are compared with those of the gate
itself: the residual is steered, the model's gate reads it, and the answer is looked up in the table of sweep.nc. If the
page holds some images only, these are counted.

--made needs no run: it times a page of IMAGES random images (5,000) as a run of tiny_imagenet100_vit_s would have,
with 100 classes and 3,072 latents, 32 of them active on each image. Nothing is compared. --keep is where the page is
left.

settings   how many were compared
differing  those of them in which any count differs
flagged    images that the page said lie within rounding of a gate's zero, in all settings together
beyond     settings in which a count differs by more than the images that were flagged there; must be 0
step_ms    median time from an input of the slider to the end of the next frame; step_ms_95 is the 95th percentile
draw_ms    median time of what the page itself does in a step, with the layout
first_ms   from the start of navigation to the end of the first drawing
bytes      of the page
images     that the page holds, and `of` how many
findings   serious and critical findings of axe-core in the three views, light and dark; null without
           axe-playwright-python
"""

import argparse
import base64
import json
import re
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from scipy.sparse import csr_array

from headsteer_jax.analysis.sweep_file import read_sweep, to_arrays
from headsteer_jax.config.files import load_config
from headsteer_jax.data.dataset import Dataset, Split
from headsteer_jax.report.explorer import TestReadings, find_neighbours, write_explorer
from headsteer_jax.runs import load_run
from headsteer_jax.runtime.files import Workdir
from headsteer_jax.sae.autoencoder import encode_split
from headsteer_jax.sae.residuals import ResidualSelection, load_all, load_or_compute_residuals
from headsteer_jax.stages import activation_cache
from headsteer_jax.steer.flips import gate_effect
from headsteer_jax.steer.gates import LayerGates, pattern_to_gates
from headsteer_jax.steer.steering import GateProgram, Steering
from headsteer_jax.steer.strategies import Choice, latent_statistics
from headsteer_jax.steer.sweep import select_classes

CHROMIUM = "/usr/bin/chromium"
CONFIG = Path(__file__).parents[1] / "configs/tiny_imagenet100_vit_s.py"  # of a made page
HAND_LATENTS = 8  # at most
STEPS = 60

STEP = """async values => {
  const slider = document.getElementById("slider"), times = [];
  for (const value of values) {
    const begin = performance.now();
    slider.value = value;
    slider.dispatchEvent(new Event("input"));
    await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
    times.push(performance.now() - begin);
  }
  return times;
}"""
DRAW = """values => values.map(value => {
  const field = document.getElementById("alpha"), begin = performance.now();
  field.value = value;
  field.dispatchEvent(new Event("input"));
  document.body.offsetHeight;
  return performance.now() - begin;
})"""
GO = """async hash => {
  const arrived = new Promise(done => addEventListener("hashchange", done, {once: true}));
  location.hash = hash;
  await arrived;
  return {...document.querySelector("#numbers tr.now").dataset};
}"""


def draw_setting(rng: np.random.Generator, arrays: dict[str, np.ndarray], latents: int) -> dict:
    """Draw a strategy of the first autoencoder or latents by hand, a class or all, and alpha."""
    C, alphas = len(arrays["class_names"]), arrays["alphas"]
    setting = {
        "class": "all" if rng.random() < 0.3 else int(rng.choice(np.unique(arrays["test_labels"]))),
        "by": str(rng.choice(["true", "predicted"])),
        "alpha": float(np.float32(round(float(rng.uniform(alphas[0], alphas[-1])), 3))),
    }
    directions = arrays.get("directions")
    known = [
        g
        for g in range(len(arrays["strategies"]))
        if (arrays["latents"][g, 0] >= 0).any() or (directions is not None and directions[g, 0].any())
    ]
    g = int(rng.choice([-1, -1, *known]))
    if g >= 0:
        setting["strategy"] = str(arrays["strategies"][g])
        chosen = arrays["latents"][g, 0]
        if (chosen >= 0).any():
            weights = np.where(chosen < 0, 0, arrays["weights"][g, 0])
            return setting | {"choice": Choice(np.maximum(chosen, 0), weights)}
        none = np.zeros((C, 0))
        return setting | {"choice": Choice(none.astype(np.int32), none.astype(np.float32), directions[g, 0])}
    most = max(HAND_LATENTS, arrays["latents"].shape[-1])
    chosen, weights = rng.choice(latents, most, replace=False), np.zeros(most)
    count = rng.integers(1, HAND_LATENTS + 1)
    weights[:count] = np.round(rng.normal(0, 1.5, count), 2)
    pairs = ",".join(f"{latent}:{weight}" for latent, weight in zip(chosen[:count], weights, strict=False))
    choice = Choice(np.tile(chosen, (C, 1)).astype(np.int32), np.tile(weights, (C, 1)).astype(np.float32))
    return setting | {"strategy": "hand", "latents": pairs, "choice": choice}


def find_serious(page: Page) -> int | None:
    """Count the serious and critical findings of axe-core in the page as it is."""
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError:
        return None
    found = [row for row in Axe().run(page).response["violations"] if row["impact"] in ("serious", "critical")]
    for row in found:
        print(json.dumps({"rule": row["id"], "impact": row["impact"], "nodes": [n["html"] for n in row["nodes"][:3]]}))
    return len(found)


def read_held_images(file: Path) -> np.ndarray:
    """Read which test images a page holds: their numbers, in its order."""
    text = file.read_text("utf-8")
    header, blob = (
        re.search(rf'<script type="{kind}" id="{name}">(.*?)</script>', text, re.DOTALL)
        for kind, name in (("application/json", "data"), ("text/plain", "blob"))
    )
    if header is None or blob is None:
        raise SystemExit(f"{file}: not a page of the explorer")
    (place,) = (row for row in json.loads(header[1])["index"] if row["name"] == "image")
    count, width = place["shape"][0], place["planes"]
    content = np.frombuffer(zlib.decompress(base64.b64decode(blob[1])), np.uint8, count * width, place["offset"])
    return content.reshape(width, count).T.astype(np.int64) @ (256 ** np.arange(width))


def make_page(file: Path, images: int) -> np.ndarray:
    """Write a page of random images, latents and answers, of the size of a run of tiny_imagenet100_vit_s.

    Returns:
      The alphas of its sweep.
    """
    config, rng = load_config(CONFIG), np.random.default_rng(0)
    C, F, side = 100, config.sae.expansion * config.model.width, config.data.image_size
    layer, S = LayerGates(config, config.sae_layer), config.steer.latents
    G, R = layer.count, len(config.steer.strategies)
    labels = np.sort(np.arange(images) % C).astype(np.int32)
    # smooth pictures: WebP would not compress noise as it does photographs
    small = rng.integers(0, 256, (images, 8, 8, 3), dtype=np.uint8)
    pictures = np.stack([np.asarray(Image.fromarray(picture).resize((side, side))) for picture in small])
    split = Split(pictures, labels)
    decoder, gate = rng.standard_normal((F, config.model.width)), rng.standard_normal((config.model.width, G)) * 0.05
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    logits = rng.standard_normal((images, G)).astype(np.float32)
    latents = np.sort(rng.random((images, F)).argpartition(config.sae.k, axis=1)[:, : config.sae.k], axis=1)
    strengths = rng.gamma(2, 1, latents.size).astype(np.float32)
    active = csr_array((strengths, latents.ravel(), np.arange(images + 1) * config.sae.k), shape=(images, F))
    neighbours, cosines = find_neighbours(decoder, np.ones(F, bool))
    readings = TestReadings(
        split=split,
        gate_logits=logits,
        size=np.abs(logits) + 1,
        active=active,
        strength=rng.gamma(2, 1, F).astype(np.float32),
        frequency=rng.random(F) * 0.03,
        selectivity=rng.random(F),
        effect=gate_effect(decoder, gate, S),
        neighbours=neighbours,
        cosines=cosines,
    )
    alphas = np.unique([0.0, *config.steer.alphas])
    pattern = (logits > 0) @ (1 << np.arange(G))
    right = rng.random((images, 2**G)) < rng.random((images, 1))  # each image has another share of right answers
    answers = np.where(right, labels[:, None], rng.integers(0, C, (images, 1))).astype(np.int32)
    counts = np.bincount(labels, minlength=C)
    arrays = {
        "strategies": np.array(config.steer.strategies),
        "alphas": alphas,
        "latents": rng.random((R, 1, C, F)).argpartition(S, axis=3)[..., :S],
        "weights": np.ones((R, 1, C, S), np.float32),
        "chosen": np.full((R, 2), len(alphas) - 4),
        "class_chosen": rng.integers(0, len(alphas), (R, 2, C)),
        "subset": np.arange(2**G),
        "test_labels": labels,
        "test_count": counts,
        "test_pattern": pattern,
        "test_prediction": answers[np.arange(images), pattern],
        "test_table": answers,
        "test_kept_patches": np.full(images, (side // config.model.patch) ** 2),
        "test_unsteered_macs": counts * float(layer.dense_macs),
    }
    names = tuple(f"class {c}" for c in range(C))
    write_explorer(epath.Path(file), "made", config, Dataset(split, split, split, names), arrays, readings)
    return alphas


class Browser:
    """A page in Chromium, and what its console said."""

    def __init__(self, playwright: Any, file: Path) -> None:
        self.file = file
        self.chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        self.page: Page = self.chromium.new_page(viewport={"width": 1280, "height": 900})
        self.problems: list[str] = []
        self.page.on("console", lambda message: self._note(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self._note(str(error)))

    def _note(self, problem: str) -> None:
        self.problems.append(problem)
        print(json.dumps({"problem": problem}))

    def open(self, hash_: str = "") -> None:
        """Open the page anew and wait for its first drawing."""
        self.page.goto("about:blank")
        self.page.goto(self.file.as_uri() + hash_)
        self.page.wait_for_selector("html[data-first-ms]", state="attached")  # without eval, which the policy forbids

    def measure_times(self, highest: float) -> dict[str, float]:
        """Time the first drawing and the steps of the slider up to the highest alpha."""
        firsts = []
        for _ in range(3):
            self.open()
            firsts.append(float(self.page.evaluate("document.documentElement.dataset.firstMs")))
        alphas = np.linspace(0, highest, STEPS).tolist()
        steps, draws = self.page.evaluate(STEP, alphas), self.page.evaluate(DRAW, alphas)
        times = {"step_ms": np.median(steps), "step_ms_95": np.quantile(steps, 0.95), "draw_ms": np.median(draws)}
        times["first_ms"] = np.median(firsts)
        return {name: round(float(ms), 1) for name, ms in times.items()}

    def find_serious(self) -> int | None:
        """Count the serious and critical findings of axe-core in all views, light and dark; None without it."""
        found = []
        for scheme in ("light", "dark"):
            self.page.emulate_media(color_scheme=scheme)
            for view in ("steer&class=0&image=0", "steer&strategy=hand&latents=0:1", "class&class=0", "latent"):
                self.open(f"#view={view}")
                found.append(find_serious(self.page))
        return None if None in found else sum(number or 0 for number in found)


def compare_settings(page: Page, args: argparse.Namespace, held: np.ndarray) -> dict[str, int]:
    """Compare the counts of random settings in the page with the gate's own, over the images that the page holds."""
    run, workdir = load_run(args.run, data=args.data), Workdir(epath.Path(args.run))
    config, arrays = run.config, to_arrays(read_sweep(args.run / "sweep.nc"))
    selection = ResidualSelection(
        select_classes(run.dataset.test, config, run.dataset.class_names), "test", (config.sae_layer,), "cls"
    )
    cache = None if config.steer.classes else activation_cache(config, workdir)
    x_ND = load_all(load_or_compute_residuals(cache, run.trained, selection)[config.sae_layer])[held]
    labels, answers, prediction, unsteered = (
        arrays[f"test_{name}"][held] for name in ("labels", "table", "prediction", "pattern")
    )
    sae = run.autoencoder(0)
    z_NF = encode_split(sae, run.x_train)
    strength = latent_statistics(
        z_NF, run.dataset.train.labels, len(run.dataset.class_names), np.zeros((z_NF.shape[1], 1))
    ).strength
    del z_NF
    program, rng = GateProgram(run.trained), np.random.default_rng(args.seed)
    settings = [draw_setting(rng, arrays, len(strength)) for _ in range(args.settings)]
    differing = flagged = beyond = 0
    for setting in settings:
        query = "&".join(f"{name}={value}" for name, value in setting.items() if name != "choice")
        shown = page.evaluate(GO, f"view=steer&{query}")
        by = labels if setting["by"] == "true" or setting["strategy"] == "hand" else prediction
        of_class = np.ones(len(labels), bool) if setting["class"] == "all" else labels == setting["class"]
        steering = Steering(sae, strength, setting["choice"])
        (pattern_N,) = program.patterns_on_grid(steering, x_ND, by, np.array([setting["alpha"]]))
        if setting["alpha"] == 0:
            pattern_N = unsteered
        right = int((answers[np.arange(len(labels)), pattern_N] == labels)[of_class].sum())
        on = pattern_to_gates(pattern_N[of_class], len(arrays["gates"])).sum(axis=0)
        off_by = np.abs([int(shown["right"]) - right, *(np.array(shown["on"].split(), int) - on)])
        differing += bool(off_by.any())
        beyond += bool(off_by.max() > int(shown["flagged"]))
        flagged += int(shown["flagged"])
        if off_by.any():
            print(json.dumps({"setting": query, "off_by": off_by.tolist(), "flagged": int(shown["flagged"])}))
    return {"settings": len(settings), "differing": differing, "flagged": flagged, "beyond": beyond}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--settings", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--made", type=int, nargs="?", const=5000, metavar="IMAGES")
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    if (args.run is None) == (args.made is None):
        parser.error("pass a finished run, or --made")
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        if args.run is None:
            file = (args.keep or Path(directory) / "explorer.html").resolve()
            alphas, total = make_page(file, args.made), args.made
        else:
            file = (args.page or args.run / "explorer.html").resolve()
            arrays = to_arrays(read_sweep(args.run / "sweep.nc"))
            alphas, total = arrays["alphas"], len(arrays["test_labels"])
        held, browser = read_held_images(file), Browser(playwright, file)
        figures: dict[str, Any] = browser.measure_times(float(alphas[-1]))
        figures |= {"bytes": file.stat().st_size, "images": len(held), "of": total}
        if args.run is not None:
            figures = compare_settings(browser.page, args, held) | figures
        figures |= {"findings": browser.find_serious(), "console_errors": len(browser.problems)}
        browser.chromium.close()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
