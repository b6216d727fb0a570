"""A study's pages: every number of study.json that they show, one row for each cell, nothing from elsewhere."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from headsteer_jax.report.study import draw_claims, draw_trade, label_metric, write_study

SEEDS = (0, 1, 3)


def made_content(cells: tuple[str, ...] = ("",), failed: bool = False) -> dict[str, Any]:
    """Make up the content of study.json."""
    claims, metrics, runs = [], [], []
    for number, cell in enumerate(cells):
        for text, holds, value in (("a <saves> heads", 2, 0.25 + number), ("b is worse", 3, 0.05), ("never", 0, None)):
            interval = None if value is None else [value - 0.02, value + 0.02]
            by_seed = [
                {"seed": seed, "value": value, "interval": interval, "holds": None if value is None else place < holds}
                for place, seed in enumerate(SEEDS)
            ]
            row = {"cell": cell, "claim": text, "holds": holds, "seeds": 3, "judged": 3 * (value is not None)}
            claims.append(row | {"value": value, "interval": interval, "least": 0.2, "by_seed": by_seed})
            claims[-1]["pooled_holds"] = None if value is None else holds == 3
        for name in (
            "gated_accuracy", "unsteered.usage", "unsteered.accuracy", "class.usage", "class.accuracy",
            "class.usage_change", "class.accuracy_change", "class.by_predicted_class.usage",
            "class.by_predicted_class.accuracy", "class.by_predicted_class.usage_change",
            "class.by_predicted_class.accuracy_change", "class.classes_saved",
        ):  # fmt: skip
            row = {"cell": cell, "metric": name, "mean": 0.5 + number, "interval": [0.4, 0.6 + number], "seeds": 3}
            by_seed = [{"seed": seed, "value": 0.5 + 0.01 * seed} for seed in SEEDS]
            metrics.append(row | {"over": "seeds", "by_seed": by_seed})
        for seed in SEEDS:
            runs.append({"cell": cell, "seed": seed, "directory": f"seed_{seed}", "state": "finished", "error": None})
    if failed:
        runs[-1] |= {"state": "failed", "error": "the loss is <NaN>"}
    grid = {"gate.budget": ["0.4", "0.5"]} if cells != ("",) else {}
    settings = {
        "config": "double_digits", "command": "headsteer study double_digits --seeds=0,1,3", "seeds": [*SEEDS],
        "grid": grid, "confidence": 0.95, "autoencoder_seeds": 3,
    }  # fmt: skip
    return {
        "settings": settings, "claims": claims, "metrics": metrics, "runs": runs, "failed": ["seed_3"] * failed,
        "cells": [
            {"cell": cell, "fields": {"gate.budget": 0.4 + 0.1 * place} if grid else {}, "seeds": [*SEEDS]}
            for place, cell in enumerate(cells)
        ],
    }  # fmt: skip


def test_the_pages_of_one_setting(tmp_path: Path) -> None:
    content = made_content(failed=True)
    write_study(content, epath.Path(tmp_path), 60)
    assert json.loads((tmp_path / "study.json").read_text()) == content
    page = (tmp_path / "study.html").read_text()
    assert page.count('src="data:image/svg+xml;base64,') == 2
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # it needs no other file
    assert "a &lt;saves&gt; heads" in page
    assert "the loss is &lt;NaN&gt;" in page
    assert '<span class="fails">2 of 3</span>' in page
    assert '<span class="holds">3 of 3</span>' in page
    assert "not reached on 3 of 3 seeds" in page
    table = (tmp_path / "study.md").read_text()
    assert "headsteer study double_digits --seeds=0,1,3" in table
    assert "| b is worse | 3 of 3 seeds | +0.0500 | +0.0300 to +0.0700 |" in table
    assert "| unsteered | 0.500 | | 0.500 | |" in table
    assert "| class | 0.500 | +0.400 to +0.600 | 0.500 | +0.4000 to +0.6000 |" in table
    assert "| class, by predicted class | 0.500 | +0.400 to +0.600 | 0.500 | +0.4000 to +0.6000 |" in table
    assert "**Failed**: seed 3 (the loss is <NaN>)." in table
    assert "| classes saved, class steering | 0.5 | 0.4 to 0.6 | 0.5, 0.5, 0.5 |" in table
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {
        "claims.png", "claims.svg", "trade.png", "trade.svg"
    }  # fmt: skip


def test_a_study_says_whether_the_autoencoder_adds_anything(tmp_path: Path) -> None:
    content = made_content()
    behind, ahead = (f"at equal usage, {name} is less accurate than class steering" for name in ("probe", "global"))
    for claim, text, interval in zip(content["claims"], (behind, ahead), ([-0.03, -0.01], [-0.01, 0.02]), strict=False):
        claim |= {"claim": text, "interval": interval, "pooled_holds": False}
    for name in ("gate_bias.usage_change", "mean_difference.accuracy_change"):
        content["metrics"].append(content["metrics"][-1] | {"metric": name, "interval": [-0.2, -0.1]})
    write_study(content, epath.Path(tmp_path), 60)
    page = (tmp_path / "study.html").read_text()
    paper, autoencoder = page.index(">The paper&#39;s claims<"), page.index(">What the autoencoder adds<")
    assert paper < page.index("global is less accurate") < page.index("no difference is shown</span>") < autoencoder
    assert autoencoder < page.index("probe is less accurate") < page.index("the opposite is shown</span>")
    table = (tmp_path / "study.md").read_text()
    assert (
        f"| {behind} | 2 of 3 seeds | +0.2500 | \N{MINUS SIGN}0.0300 to \N{MINUS SIGN}0.0100 | the opposite is shown |"
        in table
    )
    assert table.index("| the paper's claims |") < table.index(ahead) < table.index("| what the autoencoder adds |")
    assert "| change of usage, gate bias steering | +0.500 |" in table
    assert "| change of accuracy, mean difference steering | +0.5000 |" in table


def test_a_grid_has_a_row_for_each_cell(tmp_path: Path) -> None:
    content = made_content(("gate.budget=0.4", "gate.budget=0.5"))
    write_study(content, epath.Path(tmp_path), 60)
    rows = [line for line in (tmp_path / "study.md").read_text().splitlines() if line.startswith("| 0.")]
    assert [row.split(" | ")[:4] for row in rows] == [
        ["| 0.4", "3", "1 of 3", "0.500 (0.400 to 0.600)"],
        ["| 0.5", "3", "1 of 3", "1.500 (0.400 to 1.600)"],
    ]
    page = (tmp_path / "study.html").read_text()
    assert page.count('src="data:image/svg+xml;base64,') == 4
    assert 'id="cell-0">gate.budget=0.4<' in page
    assert 'id="cell-1">gate.budget=0.5<' in page
    assert (tmp_path / "figures" / "claims_1.svg").exists()


def test_without_results_there_is_only_the_record(tmp_path: Path) -> None:
    content = made_content() | {"claims": [], "metrics": []}
    write_study(content, epath.Path(tmp_path), 60)
    assert [file.name for file in tmp_path.iterdir()] == ["study.json"]
    assert draw_claims([]) is None
    assert draw_trade([row for row in made_content()["metrics"] if row["metric"] == "gated_accuracy"]) is None


def test_a_forest_plot_shows_every_estimate() -> None:
    figure = draw_claims(made_content()["claims"])
    assert figure is not None
    axes = [axes for axes in figure.axes if axes.get_visible()]
    assert len(axes) == 2  # the third claim has no value
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["seed 0", "seed 1", "seed 3", "pooled"]
    dots = [line for line in axes[0].lines if line.get_marker() == "o"]
    assert [line.get_markerfacecolor() != "white" for line in dots] == [True, True, False]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("class.usage_change", "change of usage, class steering"),
        ("gate_aligned.by_predicted_class.accuracy", "accuracy, gate aligned steering by predicted class"),
        ("mine:f.classes_saved", "classes saved, mine:f steering"),
        ("gated_accuracy", "accuracy, gated model"),
        (
            "global.total_macs_share",
            "multiply-accumulates of the layer and of steering, of the dense layer's, global steering",
        ),
    ],
)
def test_metrics_are_named_in_words(name: str, words: str) -> None:
    assert label_metric(name) == words
