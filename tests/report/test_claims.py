"""Claims on the pages: their groups, the words of a verdict, and the sentences about strategies."""

import pytest

from headsteer_jax.report.claims import group_claims, word_verdict
from headsteer_jax.report.strategies import SENTENCES, describe_strategies
from headsteer_jax.steer.catalogue import STRATEGIES

MEAN = "at equal usage, mean_difference is less accurate than class steering"
SAVING = "class steering lowers usage by at least 0.2 within 0.01 of accuracy"


@pytest.mark.parametrize(
    ("claim", "interval", "holds", "words"),
    [
        (MEAN, [0.001, 0.01], True, "holds"),
        (MEAN, [-0.004, 0.01], False, "no difference is shown"),
        (MEAN, [-0.02, -0.001], False, "the opposite is shown"),
        (MEAN, None, None, "not reached"),
        ("related classes share more heads than unrelated ones", [-0.2, -0.1], False, "the opposite is shown"),
        (SAVING, [0.1, 0.15], False, "does not hold"),
        (SAVING, [-0.1, -0.05], False, "does not hold"),
    ],
)
def test_a_verdict_says_whether_the_opposite_is_shown(
    claim: str, interval: list[float] | None, holds: bool | None, words: str
) -> None:
    assert word_verdict(claim, interval, holds) == words


def test_claims_of_the_paper_and_of_the_autoencoder_are_apart() -> None:
    """Rows of a study have no field that says what they are about."""
    texts = (
        SAVING, MEAN, "at equal usage, random_bias is less accurate than gate_bias steering",
        "at equal usage, global is less accurate than class steering",
    )  # fmt: skip
    grouped = group_claims([{"claim": text} for text in texts])
    assert [(title, [claim["claim"] for claim in claims]) for title, _, claims in grouped] == [
        ("The paper's claims", [SAVING, texts[3]]),
        ("What the autoencoder adds", [MEAN, texts[2]]),
    ]


def test_every_strategy_has_a_sentence() -> None:
    assert SENTENCES.keys() == STRATEGIES.keys()
    first, mine = describe_strategies(["gate_bias", "mine:f"])
    assert first == ("gate bias", SENTENCES["gate_bias"])
    assert mine == ("mine:f", "is the user's own")
