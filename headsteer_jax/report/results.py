"""A run's results as a Markdown page for docs/: every number from its summary.json, its figures beside the page.

python -m headsteer_jax.results RUN_DIRECTORY PAGE.md CONFIG.py
"""

import json
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from headsteer_jax.config.files import flatten, load_config
from headsteer_jax.config.schema import Config
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.report.style import format_heads, format_number, format_signed
from headsteer_jax.runtime.files import make_directory, read_json, write_bytes, write_text


def run_command(config: Config, name: str, based_on: Config, path: str) -> str:
    """The command that made a run: its config file and the fields that differ from it."""
    base, made = flatten(based_on), flatten(config)

    def text(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    changed = [f"    --config.{field}={text(value)}" for field, value in made.items() if value != base[field]]
    return " \\\n".join([f"python run.py --config={path} --workdir=runs/{name}", *changed])


def render_results(summary: dict[str, Any], folder: str, command: str, made_by: str) -> str:
    """The page's text.

    Args:
      summary: all of summary.json.
      folder: where the page's figures are, relative to it.
      command: what generates this page.
      made_by: the command of the run.
    """
    config = summary["config"]
    table, first = summary["classes"], config["gate"]["first_layer"]
    usage = [row["usage_before"] for row in table]
    curve = summary["steering"]["class"]["curve"]
    lowest = min(range(len(curve["alpha"])), key=lambda a: (curve["alpha"][a] >= 0, -curve["usage"][a]))
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": format_number, "signed": format_signed, "heads": format_heads}
    template = environment.from_string(
        resources.files(__package__).joinpath("templates/results.md.j2").read_text("utf-8")
    )
    return template.render(
        summary=summary, folder=folder, command=command, run_command=made_by,
        total_seconds=sum(summary["seconds"].values()),
        images=sum(row["images"] for row in table), classes=len(table),
        usages=", ".join(f"{first + i}: {value:.3f}" for i, value in enumerate(summary["layer_usage"])),
        usage_range=(min(usage), max(usage)),
        tokens=1 + config["model"]["registers"] + (config["data"]["image_size"] // config["model"]["patch"]) ** 2,
        best=table[:2], top=table[: config["report"]["top_classes"]],
        negative={"alpha": curve["alpha"][lowest], "usage": curve["usage"][lowest]},
        strategies=[name for name in summary["steering"] if name != "unsteered"],
    )  # fmt: skip


def write_results(workdir: Path, file: Path, config_file: str) -> None:
    """Write the page and, in a folder of its name, the figures that it shows.

    Raises:
      HeadSteerError: the run has no summary.json, or it lacks class steering; the page cannot be written.
    """
    if not (workdir / "summary.json").exists():
        raise HeadSteerError(f"{workdir}: there is no summary.json; run the stage report first")
    summary = read_json(workdir / "summary.json")
    if "classes" not in summary:
        raise HeadSteerError(f"{workdir}: this run has no class steering, which the page is about")
    config = Config.model_validate_json(json.dumps(summary["config"]))
    command = f"python -m headsteer_jax.results {workdir} {file} {config_file}"
    made_by = run_command(config, file.stem, load_config(Path(config_file), {}), config_file)
    folder = make_directory(file.parent / file.stem)
    for figure in sorted((workdir / "figures").glob("*.png")):
        write_bytes(folder / figure.name, figure.read_bytes())
    write_text(file, render_results(summary, file.stem, command, made_by))


def main(arguments: list[str]) -> int:
    if len(arguments) != 3:
        print("usage: python -m headsteer_jax.results RUN_DIRECTORY PAGE.md CONFIG.py", file=sys.stderr)
        return 2
    try:
        write_results(Path(arguments[0]), Path(arguments[1]), arguments[2])
    except HeadSteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
