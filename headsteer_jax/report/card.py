"""The model card of a run on the Hugging Face hub: a page in Markdown, whose numbers come from summary.json."""

import json
import re
from collections.abc import Mapping
from typing import Any

from headsteer_jax.config.files import flatten
from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import SPLITS
from headsteer_jax.report.render import render_template

SHOWN_CLASSES = 10  # rows of the table of classes, and names of classes in the text
PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")


def escape_markdown(text: str) -> str:
    """Escape a text that a user chose, so that Markdown shows it as it is, on one line and without any HTML."""
    return PUNCTUATION.sub(r"\\\1", " ".join(text.split()))


def render_run_card(summary: Mapping[str, Any], data: Mapping[str, Any], name: str, location: str) -> str:
    """Render the model card of a run, which begins with the metadata that the hub reads.

    Args:
      summary: the content of summary.json.
      data: the description of the data in the record of the stage train.
      name: the run's name.
      location: where it is read from: hf://owner/name.
    """
    config = Config.model_validate_json(json.dumps(summary["config"]))
    defaults = flatten(Config())
    fields = [
        f"{path} = {json.dumps(value)}".replace("`", "\\u0060")  # no value ends the block that they are in
        for path, value in flatten(config).items()
        if value != defaults[path]
    ]
    class_names = [escape_markdown(label) for label in data["classes"]]
    return render_template(
        "card.md.j2", name=escape_markdown(name), location=location, summary=summary, config=config, fields=fields,
        source=escape_markdown(config.data.name or config.data.source), classes=class_names, shown=SHOWN_CLASSES,
        images={split: sum(data[split]["images"]) for split in SPLITS},
        rows=[(escape_markdown(row["name"]), row) for row in summary.get("classes", [])[:SHOWN_CLASSES]],
        strategies=[(escape_markdown(key), row) for key, row in summary["steering"].items() if key != "unsteered"],
        claims=[(escape_markdown(claim["claim"]), claim) for claim in summary.get("claims", [])],
    ) + "\n"  # fmt: skip
