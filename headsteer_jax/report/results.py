"""A run's results as a Markdown page for docs/: its numbers come from summary.json, and its figures are beside it."""

import json
import shlex
from typing import Any

from etils.epath import Path

from headsteer_jax.config.files import flatten, format_override
from headsteer_jax.config.schema import Config
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.report.render import render_template
from headsteer_jax.runtime.files import Workdir, check_replaceable, make_directory, read_json, write_bytes, write_text


def format_run_command(config: Config, name: str, based_on: Config, config_name: str) -> str:
    """Format the command that made a run: the config that it began with, and every field that it changed."""
    base, final = flatten(based_on), flatten(config)
    start = shlex.join(["headsteer", "run", f"--config={config_name}", f"--workdir=runs/{name}"])
    changed = [
        "    " + shlex.quote(f"--config.{field}={format_override(value)}")
        for field, value in final.items()
        if value != base[field]
    ]
    return " \\\n".join([start, *changed])


def render_results(summary: dict[str, Any], folder: str, command: str, run_command: str) -> str:
    """Render the page's text.

    Args:
      summary: the content of summary.json.
      folder: the directory of the page's figures, relative to the page.
      command: the command that writes this page.
      run_command: the command that made the run.
    """
    config = summary["config"]
    rows, first_layer = summary["classes"], config["gate"]["first_layer"]
    usage = [row["usage_before"] for row in rows]
    curve = summary["steering"]["class"]["curve"]
    lowest = min(range(len(curve["alpha"])), key=lambda a: (curve["alpha"][a] >= 0, -curve["usage"][a]))
    return render_template(
        "results.md.j2",
        summary=summary, folder=folder, command=command, run_command=run_command,
        total_seconds=sum(summary["seconds"].values()),
        images=sum(row["images"] for row in rows), classes=len(rows),
        usages=", ".join(f"{first_layer + i}: {value:.3f}" for i, value in enumerate(summary["layer_usage"])),
        usage_range=(min(usage), max(usage)),
        tokens=1 + config["model"]["registers"] + (config["data"]["image_size"] // config["model"]["patch"]) ** 2,
        best=rows[:2], top=rows[: config["report"]["top_classes"]],
        negative={"alpha": curve["alpha"][lowest], "usage": curve["usage"][lowest]},
        strategies=[name for name in summary["steering"] if name != "unsteered"],
    )  # fmt: skip


def check_results_page(file: Path) -> None:
    """Check that a results page and its figures replace nothing but an earlier page.

    Raises:
      HeadSteerError: a file that would be written exists, and HeadSteer did not write it.
    """
    check_replaceable(file, "\n\n*Generated from ")
    if not file.exists() and (figure := next((file.parent / file.stem).glob("*.png"), None)):
        raise HeadSteerError(
            f"{figure}: exists, but {file} does not, so HeadSteer did not write it; choose another path"
        )


def write_results(workdir: Workdir, file: Path, config_name: str, based_on: Config) -> None:
    """Write a results page and, in a directory of the same name, its figures.

    Args:
      config_name: the config that the run began with, as given on the command line.
      based_on: that config, without the run's overrides.

    Raises:
      HeadSteerError: the run has no class steering, or the page cannot be written.
    """
    summary = read_json(workdir / "summary.json")
    if "classes" not in summary:
        raise HeadSteerError(f"{workdir.path}: this run has no class steering, which the page is about")
    config = Config.model_validate_json(json.dumps(summary["config"]))
    command = shlex.join(["headsteer", "page", str(workdir.path), f"--results={file}", f"--config={config_name}"])
    run_command = format_run_command(config, file.stem, based_on, config_name)
    folder = make_directory(file.parent / file.stem)
    for figure in sorted((workdir / "figures").glob("*.png")):
        write_bytes(folder / figure.name, figure.read_bytes())
    write_text(file, render_results(summary, file.stem, command, run_command))
