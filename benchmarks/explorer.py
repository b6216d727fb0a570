"""Steer random settings in explorer.html and in the package, and time the page; the last line is one JSON object.

    python benchmarks/explorer.py DIR [--page=explorer.html] [--data=PATH] [--settings=100]

DIR is a finished run; its page is taken from there unless --page names another. In each setting the counts that a
browser shows, of right answers and of the images on which each gate is open, are compared with those of the gate
itself: the residual is steered, the model's gate reads it, and the answer is looked up in the table of sweep.nc.

settings   how many were compared
differing  those of them in which any count differs
flagged    images that the page said lie within rounding of a gate's zero, in all settings together
beyond     settings in which a count differs by more than the images that were flagged there; must be 0
step_ms    median time from an input of the slider to the end of the next frame; step_ms_95 is the 95th percentile
draw_ms    median time of what the page itself does in a step, with the layout
first_ms   from the start of navigation to the end of the first drawing
bytes      of the page
findings   serious and critical findings of axe-core in the three views, light and dark; null without
           axe-playwright-python
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from playwright.sync_api import Page, sync_playwright

from headsteer_jax.analysis.sweep_file import read_sweep, to_arrays
from headsteer_jax.runs import load_run
from headsteer_jax.runtime.files import Workdir
from headsteer_jax.sae.autoencoder import encode_split
from headsteer_jax.sae.residuals import ResidualSelection, load_all, load_or_compute_residuals
from headsteer_jax.stages import activation_cache
from headsteer_jax.steer.gates import pattern_to_gates
from headsteer_jax.steer.steering import GateProgram, Steering
from headsteer_jax.steer.strategies import Choice, latent_statistics
from headsteer_jax.steer.sweep import select_classes

CHROMIUM = "/usr/bin/chromium"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--settings", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    file = (args.page or args.run / "explorer.html").resolve()

    run, workdir = load_run(args.run, data=args.data), Workdir(epath.Path(args.run))
    config, arrays = run.config, to_arrays(read_sweep(args.run / "sweep.nc"))
    selection = ResidualSelection(
        select_classes(run.dataset.test, config, run.dataset.class_names), "test", (config.sae_layer,), "cls"
    )
    cache = None if config.steer.classes else activation_cache(config, workdir)
    x_ND = load_all(load_or_compute_residuals(cache, run.trained, selection)[config.sae_layer])
    labels, answers, prediction = (arrays[f"test_{name}"] for name in ("labels", "table", "prediction"))
    sae = run.autoencoder(0)
    z_NF = encode_split(sae, run.x_train)
    strength = latent_statistics(
        z_NF, run.dataset.train.labels, len(run.dataset.class_names), np.zeros((z_NF.shape[1], 1))
    ).strength
    del z_NF
    program, rng = GateProgram(run.trained), np.random.default_rng(args.seed)
    settings = [draw_setting(rng, arrays, len(strength)) for _ in range(args.settings)]

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        firsts = []
        for _ in range(3):
            page.goto(file.as_uri())
            page.wait_for_selector("html[data-first-ms]", state="attached")  # without eval, which the policy forbids
            firsts.append(float(page.evaluate("document.documentElement.dataset.firstMs")))
        times = page.evaluate(STEP, np.linspace(0, float(arrays["alphas"][-1]), STEPS).tolist())
        drawing = page.evaluate(DRAW, np.linspace(0, float(arrays["alphas"][-1]), STEPS).tolist())
        differing = flagged = beyond = 0
        for setting in settings:
            query = "&".join(f"{name}={value}" for name, value in setting.items() if name != "choice")
            shown = page.evaluate(GO, f"view=steer&{query}")
            by = labels if setting["by"] == "true" or setting["strategy"] == "hand" else prediction
            of_class = np.ones(len(labels), bool) if setting["class"] == "all" else labels == setting["class"]
            steering = Steering(sae, strength, setting["choice"])
            (pattern_N,) = program.patterns_on_grid(steering, x_ND, by, np.array([setting["alpha"]]))
            if setting["alpha"] == 0:
                pattern_N = arrays["test_pattern"]
            right = int((answers[np.arange(len(labels)), pattern_N] == labels)[of_class].sum())
            on = pattern_to_gates(pattern_N[of_class], len(arrays["gates"])).sum(axis=0)
            off_by = np.abs([int(shown["right"]) - right, *(np.array(shown["on"].split(), int) - on)])
            differing += bool(off_by.any())
            beyond += bool(off_by.max() > int(shown["flagged"]))
            flagged += int(shown["flagged"])
            if off_by.any():
                print(json.dumps({"setting": query, "off_by": off_by.tolist(), "flagged": int(shown["flagged"])}))
        findings: int | None = 0
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            for view in ("steer&class=0&image=0", "steer&strategy=hand&latents=0:1", "class&class=0", "latent"):
                page.goto("about:blank")
                page.goto(f"{file.as_uri()}#view={view}")
                page.wait_for_selector("html[data-first-ms]", state="attached")
                found = find_serious(page)
                findings = None if found is None or findings is None else findings + found
        browser.close()
    for problem in problems:
        print(json.dumps({"problem": problem}))
    figures: dict[str, Any] = {"settings": len(settings), "differing": differing, "flagged": flagged, "beyond": beyond}
    figures |= {"step_ms": round(float(np.median(times)), 1), "step_ms_95": round(float(np.quantile(times, 0.95)), 1)}
    figures["draw_ms"] = round(float(np.median(drawing)), 1)
    figures |= {"first_ms": round(float(np.median(firsts)), 1), "bytes": file.stat().st_size}
    print(json.dumps(figures | {"findings": findings, "console_errors": len(problems)}))


if __name__ == "__main__":
    main()
