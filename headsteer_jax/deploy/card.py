"""What a deployed model is worth: its card, for people (card.md) and programs (card.json)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from headsteer_jax.analysis.stats import mcnemar_p
from headsteer_jax.deploy.cost import count_macs, count_parameters
from headsteer_jax.deploy.images import Answers
from headsteer_jax.deploy.model import DeployedModel

CONFIDENCE = 0.95


def score_answers(answers: Answers) -> dict[str, Any]:
    """Score answers: `images`, `accuracy` and its Wilson `interval`."""
    right = int(answers.right.sum())
    interval = stats.binomtest(right, len(answers.right)).proportion_ci(CONFIDENCE, method="wilson")
    return {"images": len(answers.right), "accuracy": answers.accuracy, "interval": [interval.low, interval.high]}


def compare_answers(answers: Answers, dense: Answers) -> dict[str, Any]:
    """Score a model's answers and the dense model's on the same images, with the exact McNemar test of the pair."""
    gained, lost = (int(np.sum(a.right & ~b.right)) for a, b in ((answers, dense), (dense, answers)))
    return score_answers(answers) | {
        "dense": score_answers(dense), "gained": gained, "lost": lost, "p": float(mcnemar_p(gained, lost)),
    }  # fmt: skip


def make_card(
    model: DeployedModel, dense: DeployedModel, scores: Mapping[str, Any], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Make the card of a deployed model.

    Args:
      dense: the dense model for the same classes.
      scores: by split, what `compare_answers` returns.
      provenance: where the model comes from, and how it was made.
    """
    sizes = {
        name: {"macs": count_macs(counted.config), "parameters": count_parameters(counted.params)}
        for name, counted in (("deployed", model), ("dense", dense))
    }
    return {
        **provenance, "classes": list(model.config.classes), **scores, "size": sizes,
        "heads": list(model.config.heads), "neurons": list(model.config.neurons),
    }  # fmt: skip


def render_card(card: Mapping[str, Any], speed: Mapping[str, Any], files: Sequence[str]) -> str:
    """Render a card as a page in Markdown.

    Args:
      speed: the content of speed.json.
      files: the names of the files that lie beside it.
    """
    test, size = card["test"], card["size"]
    rows = {row["what"]: row["images_per_second"] for row in speed["rows"]}
    deployed = rows[speed["deployed"]]
    lines = [f"# {card['title']}", "", f"{card['text']}", "", "| | dense | deployed |", "|---|---|---|"]
    low_high = [f"{scores['accuracy']:.1%} ({scores['interval'][0]:.1%} to {scores['interval'][1]:.1%})"
                for scores in (test["dense"], test)]  # fmt: skip
    lines.append(f"| accuracy on {test['images']} test images | {low_high[0]} | {low_high[1]} |")
    macs, numbers = size["dense"]["macs"], (size[model]["parameters"] for model in ("dense", "deployed"))
    lines.append(f"| multiply-accumulates of an image | {macs:,} | {round(card['share_of_macs'] * macs):,} |")
    lines.append("| parameters | {:,} | {:,} |".format(*numbers))
    for batch in deployed:
        ratio = deployed[batch] / rows["dense"][batch]
        lines.append(
            f"| images a second, batch {batch} | {rows['dense'][batch]:,.0f} | {deployed[batch]:,.0f} ({ratio:.2f}x) |"
        )
    lines += [
        "",
        f"The deployed model is right on {test['gained']} test images on which the dense model, restricted to the same "
        f"classes, is wrong, and wrong on {test['lost']} on which it is right: p = {test['p']:.2g} (exact McNemar "
        f"test). Intervals are Wilson's, at {CONFIDENCE:.0%}. Speeds are medians of measurements in turns on "
        f"{speed['device']}.",
        "",
        "| layer | heads | MLP neurons |",
        "|---|---|---|",
        *(f"| {i} | {h} | {n} |" for i, (h, n) in enumerate(zip(card["heads"], card["neurons"], strict=True))),
        "",
        f"Classes: {', '.join(card['classes'])}.",
        "",
        f"Files: {', '.join(files)}.",
    ]
    return "\n".join(lines) + "\n"
