"""The stage front: gated models of several budgets from one dense model, measured on test, resumable."""

import json
from pathlib import Path

import numpy as np
import pytest
from builders import tiny_config
from helpers import FinishedRun, headsteer

from headsteer_jax.analysis.front import list_budgets
from headsteer_jax.config import Config, FrontConfig
from headsteer_jax.config.schema import TokenGateConfig
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.compute import ImageGates, pack_gates, unpack_gates
from headsteer_jax.runtime.files import read_arrays

ALL_KINDS = tiny_config(kinds=("heads", "sublayers", "tokens"))


def with_budgets(config: Config, *budgets: float) -> Config:
    return config.model_copy(update={"front": FrontConfig(budgets=budgets)})


def test_budgets_are_spread_between_what_gates_cannot_switch_off_and_1() -> None:
    for config in (tiny_config(), ALL_KINDS):
        budgets = list_budgets(config, 7)
        gaps = np.diff(budgets)
        assert len(budgets) == 4
        assert np.ptp(gaps) < 0.011  # they are rounded
        assert budgets[0] - gaps[0] == pytest.approx(1 - 5 * gaps.mean(), abs=0.02)
    assert list_budgets(ALL_KINDS, 7)[0] < list_budgets(tiny_config(), 7)[0]
    assert list_budgets(with_budgets(ALL_KINDS, 0.9, 0.7), 7) == (0.7, 0.9)
    own = ALL_KINDS.model_copy(update={"gate": ALL_KINDS.gate.model_copy(update={"budget": 0.8})})
    assert list_budgets(with_budgets(own, 0.9, 0.7), 7) == (0.7, 0.8, 0.9)


def test_a_budget_out_of_reach_is_one_clear_line() -> None:
    with pytest.raises(
        HeadSteerError, match=r"config\.front\.budgets = 0\.2: must be at least 0\.\d+, because"
    ) as error:
        list_budgets(with_budgets(tiny_config(), 0.2, 0.9), 7)
    assert "\n" not in str(error.value)


def test_gates_survive_a_file() -> None:
    rng = np.random.default_rng(0)
    counts = {"heads": 3, "sublayers": 2, "tokens": 4}
    config = ALL_KINDS.model_copy(
        update={"gate": ALL_KINDS.gate.model_copy(update={"tokens": TokenGateConfig(first_layer=1)})}
    )
    gates = {kind: rng.random((6, len(config.layers_with(kind)), n)) < 0.5 for kind, n in counts.items()}
    images = ImageGates(gates, rng.random(6).astype(np.float32), np.arange(6, dtype=np.int32))
    arrays = pack_gates(images)
    assert all(arrays[kind].dtype == np.uint8 for kind in counts)
    again = unpack_gates(arrays, config)
    assert again.gates.keys() == gates.keys()
    for kind, g in gates.items():
        np.testing.assert_array_equal(again.gates[kind], g)
    np.testing.assert_array_equal(again.macs, images.macs)
    np.testing.assert_array_equal(again.prediction, images.prediction)


@pytest.fixture(scope="module")
def front(finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run with two budgets; one is a share that these gates reach, one is nearly dense."""
    workdir = finished.copy(tmp_path_factory.mktemp("front"))
    result = headsteer(
        "run", f"--config={finished.config}", f"--workdir={workdir}", "--stages=front,report", "--overwrite",
        "--config.front.budgets=0.99,0.9",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return workdir


def test_every_budget_is_measured_on_test(front: Path) -> None:
    content = json.loads((front / "front/front.json").read_text())
    trained = json.loads((front / "train/test.json").read_text())
    assert [row["budget"] for row in content["rows"]] == [0.9, 0.99]
    assert content["dense_accuracy"] == trained["dense"]
    assert content["dense_control_accuracy"] == trained["dense_control"]
    for row in content["rows"]:
        change = row["accuracy"] - trained["dense_control"]
        for (low, high), value in ((row["accuracy_ci"], row["accuracy"]), (row["dense_control_change_ci"], change)):
            assert low - 1e-6 <= value <= high + 1e-6
        assert row["share"] == pytest.approx(row["macs"] / row["dense_macs"])
        assert row["usage"].keys() == row["layer_usage"].keys() == {"heads"}
        assert np.mean(row["layer_usage"]["heads"]) == pytest.approx(row["usage"]["heads"])
    assert json.loads((front / "summary.json").read_text())["front"] == content
    assert (front / "figures/budgets.png").exists()
    assert "Each point is a gated model of another budget" in (front / "report.html").read_text()


def test_gates_of_the_test_images_are_kept(front: Path) -> None:
    arrays, trained = read_arrays(front / "train/gates.npz"), json.loads((front / "train/test.json").read_text())
    config = Config.model_validate_json((front / "config.json").read_text())
    images = unpack_gates(arrays, config)
    np.testing.assert_allclose(images.gates["heads"].mean(axis=(0, 2)), trained["usage"])
    assert images.macs.mean() == pytest.approx(trained["compute"]["macs"])


def test_a_run_without_front_reports_as_before(finished: FinishedRun) -> None:
    assert json.loads((finished.workdir / "summary.json").read_text())["front"] is None
    assert 'id="compute"' not in (finished.workdir / "report.html").read_text()


def test_what_is_trained_is_not_trained_again(front: Path, finished: FinishedRun) -> None:
    before = (front / "front/front.json").read_bytes()
    (front / "front/done.json").unlink()
    result = headsteer(
        "run", f"--config={finished.config}", f"--workdir={front}", "--stages=front", "--config.front.budgets=0.99,0.9"
    )
    assert result.returncode == 0, result.stderr
    assert (front / "front/front.json").read_bytes() == before
    assert "validation accuracy" not in result.stderr  # no step was taken
