"""How the pages group claims, and how they word a verdict."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from headsteer_jax.analysis.claims import About, find_subject

# what a group's claims are about, its heading, and what the pages say of it
GROUPS: tuple[tuple[About, str, str], ...] = (
    (
        "paper", "The paper's claims",
        "Lee & Har (arXiv:2603.26743) report these; some are tested more strictly than they do.",
    ),
    (
        "autoencoder", "What the autoencoder adds",
        "Is a vector found by a sparse autoencoder worth more than one found without? Where the opposite is shown, the "
        "autoencoder adds no accuracy; where no difference is shown, nothing says that it adds any. Vectors found "
        "without it are tested against random ones.",
    ),
    (
        "pruning", "What steering adds to plain pruning",
        "Would the layer do as well with as many heads, but the same ones for every image? Of each size, the subset is "
        "the best on validation. Such subsets need neither an autoencoder nor a label.",
    ),
    ("further", "Further strategies", "The paper does not have these strategies."),
    ("compute", "Multiply-accumulates", "These claims are about what the layer computes."),
)  # fmt: skip
# claims that name the larger of two: their opposite says something as well
DIRECTED = ("at equal usage, ", "at the usage of ", "suppression ", "related classes ")

Verdict = Literal["holds", "the opposite is shown", "no difference is shown", "does not hold", "not reached"]


def group_claims(claims: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
    """Group claims of summary.json or study.json by what they are about: heading, explanation and claims of each."""
    grouped = [
        (title, text, [claim for claim in claims if find_subject(claim["claim"]) == about])
        for about, title, text in GROUPS
    ]
    return [group for group in grouped if group[2]]


def word_verdict(claim: str, interval: Sequence[float] | None, holds: bool | None) -> Verdict:
    """Word the verdict on a claim.

    Args:
      claim: its text.
      interval: of its value.
      holds: None if it could not be judged.
    """
    if holds is None or interval is None:
        return "not reached"
    if holds:
        return "holds"
    if not claim.startswith(DIRECTED):
        return "does not hold"
    return "the opposite is shown" if interval[1] < 0 else "no difference is shown"
