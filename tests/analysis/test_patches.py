"""The summary and the claim of steered patches, on made-up sweeps whose answer is known."""

import numpy as np
import pytest
from builders import setting

from headsteer_jax.analysis.patches import claim_own_patches, summarise_patches
from headsteer_jax.config import Config, DataConfig, GateConfig, SteerConfig
from headsteer_jax.steer.patches import PatchSplit, PatchSweep

ALPHAS = np.array([0.0, 1.0, 2.0])
N, PATCHES, OWN = 60, 16, 6


def made(own_by_class: int, other_by_class: int, known: bool = True) -> tuple[PatchSweep, Config]:
    """Without steering 4 own and 5 other patches stay; `class` at alpha 1 keeps as many as are given, `random` no more.

    At alpha 2 `class` saves more, but loses accuracy.
    """
    config = Config(
        data=DataConfig(image_size=16), gate=GateConfig(kinds=("heads", "tokens")),
        steer=SteerConfig(bootstrap=200, tolerance=0.01),
    )  # fmt: skip

    def split(seed: int) -> PatchSplit:
        rng = np.random.default_rng(seed)
        own, other = np.full((2, 2, 3, N), 4), np.full((2, 2, 3, N), 5)
        own[0, :, 1], other[0, :, 1] = own_by_class, other_by_class
        own[0, :, 2], other[0, :, 2] = 0, 0
        own = np.clip(own + (rng.random(own.shape) < 0.3), 0, OWN)
        right = np.broadcast_to(np.arange(N) % 10 < 9, own.shape).copy()
        right[0, :, 2] = np.arange(N) % 2 == 0
        labels = (np.arange(N) // 20).astype(np.int32)
        return PatchSplit(
            labels, right, own + other, np.full(N, OWN) if known else None, own if known else None,
            1000.0 + 10 * (own + other),
        )  # fmt: skip

    shape = (2, 2, 3, 4)
    latents, weights = np.zeros(shape, np.int32), np.ones(shape, np.float32)
    return PatchSweep(
        ("class", "matched_random"), ALPHAS, PATCHES, latents, weights, split(0), split(1), setting()
    ), config


def test_alpha_is_chosen_on_validation_and_scored_on_test() -> None:
    sweep, config = made(5, 1)
    summary = summarise_patches(sweep, ("a", "b", "c"), config)
    row, test = summary["steering"]["class"], sweep.test
    assert row["alpha"] == 1.0  # alpha 2 costs less, but loses accuracy
    assert row["kept"] == pytest.approx(test.kept_patches[0, :, 1].mean() / PATCHES)
    assert row["own"] == pytest.approx(test.kept_class_patches[0, :, 1].mean() / OWN)
    assert row["other"] == pytest.approx(1 / (PATCHES - OWN))
    assert row["macs"] == pytest.approx(test.macs[0, :, 1].mean())
    assert row["curve"]["accuracy"] == pytest.approx([0.9, 0.9, 0.5])
    low, high = row["macs_change_ci"]
    assert low <= row["macs"] - row["curve"]["macs"][0] <= high < 0
    assert [entry["name"] for entry in summary["classes"]] == ["a", "b", "c"]
    first = test.labels == 0
    assert summary["classes"][0]["own_after"] == pytest.approx(test.kept_class_patches[0, :, 1][:, first].mean() / OWN)
    assert summary["classes"][0]["own_before"] == pytest.approx(test.kept_class_patches[0, :, 0][:, first].mean() / OWN)


@pytest.mark.parametrize(
    ("own", "other", "holds"),
    [(5, 1, True), (5, 10, False), (4, 5, False), (2, 1, False)],
    ids=["its own", "everything", "nothing", "fewer"],
)
def test_own_patches_must_stay_more_than_with_random_latents(own: int, other: int, holds: bool) -> None:
    """More of its own must stay, and not only because more of everything stays."""
    sweep, config = made(own, other)
    claim = claim_own_patches(sweep, config)
    assert claim is not None
    lead = (sweep.test.kept_class_patches[0, :, 1] - sweep.test.kept_class_patches[1, :, 1]).mean() / OWN
    assert claim["value"] == pytest.approx(lead)
    assert claim["interval"][0] <= lead <= claim["interval"][1]
    assert claim["alpha"] == 1.0  # at alpha 2 validation loses accuracy
    over = lead - (other - 5) / (PATCHES - OWN)
    assert claim["over_other"] == pytest.approx(over)
    assert claim["over_other_ci"][0] <= over <= claim["over_other_ci"][1]
    assert claim["holds"] is holds


def test_without_known_patches_there_is_no_claim() -> None:
    sweep, config = made(5, 1, known=False)
    summary = summarise_patches(sweep, ("a", "b", "c"), config)
    assert claim_own_patches(sweep, config) is None
    assert "own" not in summary["steering"]["class"]


def test_a_claim_that_no_alpha_can_show_is_not_judged() -> None:
    sweep, config = made(5, 1)
    sweep.validation.right[:, :, 1:] = False
    claim = claim_own_patches(sweep, config)
    assert claim is not None
    assert claim["value"] is None
    assert claim["holds"] is None
