"""report.html: one page that holds the figures, the tables and how to read both."""

import base64
from importlib import resources
from typing import Any

import numpy as np
from etils.epath import Path
from jinja2 import Environment, StrictUndefined

from headsteer_jax.config.files import flatten
from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import Dataset
from headsteer_jax.report.figures import FIGURES, render_figure
from headsteer_jax.report.style import ReportData, format_heads, format_number, format_signed
from headsteer_jax.runtime.files import make_directory, write_bytes, write_text


def write_report(
    config: Config,
    name: str,
    dataset: Dataset,
    summary: dict[str, Any],
    arrays: dict[str, np.ndarray],
    rows: list[dict[str, Any]],
    workdir: Path,
) -> None:
    """Write <workdir>/figures/NAME.png and NAME.svg, and <workdir>/report.html, which holds the SVGs.

    Args:
      name: the run's, for the title.
      summary: all of summary.json.
      arrays: all of sweep.nc.
      rows: metrics.jsonl.
    """
    m = ReportData(config, dataset, summary, arrays, rows)
    directory = make_directory(workdir / "figures")
    images = {}
    for figure in FIGURES:
        files = render_figure(m, figure)
        for kind in ("png", "svg"):
            path = directory / f"{figure}.{kind}"
            if files is None:
                path.unlink(missing_ok=True)  # from an earlier report
            else:
                write_bytes(path, files[kind])
        if files is not None:
            images[figure] = "data:image/svg+xml;base64," + base64.b64encode(files["svg"]).decode()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": format_number, "signed": format_signed, "heads": format_heads}
    template = environment.from_string(
        resources.files(__package__).joinpath("templates/report.html.j2").read_text("utf-8")
    )
    page = template.render(
        name=name, config=config, fields=flatten(config), summary=summary, images=images, strategies=list(m.colours),
        main=m.main, test_images=m.images, classes=int((arrays["test_count"] > 0).sum()),
        heads=arrays["test_heads_on"].shape[-1],
    )  # fmt: skip
    write_text(workdir / "report.html", page)
