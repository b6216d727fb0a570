"""The figures of compute: which images and patches they show, and when there are none."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from made_run import made_compute, made_run

from headsteer_jax.config import ModelConfig
from headsteer_jax.data.dataset import Split
from headsteer_jax.report import compute
from headsteer_jax.report.style import ReportData, apply_style


def report_data(run: dict[str, Any]) -> ReportData:
    return ReportData(**{name: value for name, value in run.items() if name != "name"})


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    return made_run(classes=5, heads=3, seeds=1)


def test_dropped_patches_are_grey_and_kept_ones_unchanged() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (10, 10, 3), dtype=np.uint8)
    kept = np.array([True, False, False, True])
    shown = compute.grey_dropped_patches(image, kept)
    quarters = [(slice(0, 5), slice(0, 5)), (slice(0, 5), slice(5, 10)), (slice(5, 10), slice(0, 5)), np.s_[5:, 5:]]
    for place, keeps in zip(quarters, kept, strict=True):
        if keeps:
            np.testing.assert_array_equal(shown[place], image[place])
        else:
            assert shown[place].min() >= 190  # light, whatever was there
            assert shown[place].std() < image[place].std() / 4


def test_examples_are_the_cheapest_and_dearest_of_distinct_classes_answered_rightly(run: dict[str, Any]) -> None:
    m = report_data(made_compute(run))
    assert m.gates is not None
    easy, hard = compute._choose_examples(m, m.gates, 3)
    labels, right = m.dataset.test.labels, m.gates.prediction == m.dataset.test.labels
    for chosen, cost in ((easy, m.gates.macs), (hard, -m.gates.macs)):
        assert right[chosen].all()
        assert len(set(labels[chosen])) == 3
        cheapest = {label: cost[right & (labels == label)].min() for label in np.unique(labels)}
        assert cost[chosen[0]] == min(cheapest.values())
    assert set(easy).isdisjoint(hard)


def test_examples_may_be_fewer_than_wanted(run: dict[str, Any]) -> None:
    m = report_data(made_compute(run))
    assert m.gates is not None
    few = m._replace(dataset=replace(m.dataset, test=Split(m.dataset.test.images[:2], np.zeros(2, np.int32))))
    images = compute.ImageGates({}, np.array([2.0, 1.0]), np.zeros(2, np.int32))
    assert [part.tolist() for part in compute._choose_examples(few, images, 1)] == [[1], [0]]
    assert [part.tolist() for part in compute._choose_examples(few, images, 3)] == [[1, 0], []]


def draw(run: dict[str, Any]) -> dict[str, bool]:
    """Draw the figures of compute; says which there are."""
    m, drawn = report_data(run), {}
    for name in ("patches", "usage", "macs", "budgets"):
        with apply_style():
            figure = getattr(compute, f"draw_{name}")(m)
            drawn[name] = figure is not None
            if figure is not None:
                figure.draw_without_rendering()
    return drawn


def test_heads_alone_have_no_figures_of_compute(run: dict[str, Any]) -> None:
    gates = made_compute(run, kinds=("heads",))["gates"]
    assert not any(draw(run | {"gates": gates}).values())


@pytest.mark.parametrize(
    ("kinds", "patches"),
    [(("heads",), False), (("sublayers",), False), (("tokens",), True), (("heads", "tokens"), True)],
)
def test_every_set_of_kinds_can_be_drawn(run: dict[str, Any], kinds: tuple[str, ...], patches: bool) -> None:
    wanted = {"patches": patches, "usage": True, "macs": True, "budgets": True}
    assert draw(made_compute(run, kinds=kinds, steered=False)) == wanted


def test_without_a_log_and_without_the_stage_front(run: dict[str, Any]) -> None:
    made = made_compute(run)
    made |= {"rows": [], "summary": made["summary"] | {"front": None}}
    assert draw(made) == {"patches": True, "usage": True, "macs": True, "budgets": False}


def test_notes_say_what_a_layer_runs(run: dict[str, Any]) -> None:
    made = made_compute(run)
    m = report_data(made)
    gates = {
        "heads": np.array([[[True, False, False], [True, True, False], [False] * 3]]),
        "sublayers": np.array([[[True, True], [False, True], [True, False]]]),
        "tokens": np.arange(4 * 25).reshape(1, 4, 25) % 25 < np.arange(4)[:, None],
    }
    images = compute.ImageGates(gates, np.zeros(1), np.zeros(1, np.int32))
    notes = [compute._describe_gates(m, images, 0, layer) for layer in range(4)]
    assert notes == ["0 of 25", "1 of 25\n1 head", "2 of 25\nno attn", "3 of 25\n0 heads\nno MLP"]


def test_many_layers_are_drawn_one_image_below_the_other(run: dict[str, Any]) -> None:
    config = run["config"]
    deep = config.model_copy(update={"model": ModelConfig(depth=12, width=config.model.width, heads=3)})
    with apply_style():
        few, many = (
            compute.draw_patches(report_data(made_compute(run | {"config": own}, steered=False)))
            for own in (config, deep)
        )
    assert few is not None
    assert many is not None
    columns = [len({round(axes.get_position().x0, 6) for axes in figure.axes}) for figure in (few, many)]
    assert columns == [2 * 5, 13]
