"""The pages report.html, latents.html and explorer.html, with figures, tables, and explanations of all."""

import base64

from etils.epath import Path

from headsteer_jax.analysis.sweep_file import read_sweep, to_arrays
from headsteer_jax.config.files import flatten
from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import Dataset
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.compute import ImageGates, measure_compute, unpack_gates
from headsteer_jax.report.explorer import TestReadings, write_explorer
from headsteer_jax.report.figures import FIGURE_FILES, FIGURES, render_figure
from headsteer_jax.report.latents import write_latents_page
from headsteer_jax.report.render import render_template
from headsteer_jax.report.style import ReportData
from headsteer_jax.runtime.files import (
    Workdir,
    check_replaceable,
    make_directory,
    read_arrays,
    read_json,
    write_bytes,
    write_text,
)
from headsteer_jax.train.log import read_log

PAGES = ("report.html", "latents.html", "explorer.html")


def check_output(directory: Path) -> None:
    """Check that pages and figures replace nothing but earlier ones.

    Raises:
      HeadSteerError: a file that would be written exists, and HeadSteer did not write it.
    """
    remedy = "choose another --output"
    pages = [directory / name for name in PAGES]
    for page in pages:
        check_replaceable(page, 'content="HeadSteer"', remedy)
    for file in () if any(page.exists() for page in pages) else FIGURE_FILES:
        if (directory / file).exists():  # without a page beside it, it is of another make
            raise HeadSteerError(f"{directory / file}: exists, and HeadSteer did not write it; {remedy}")


def write_pages(
    config: Config, dataset: Dataset, workdir: Workdir, readings: TestReadings, output: Path | None = None
) -> None:
    """Draw a run's figures and write its pages from summary.json, sweep.nc and the other files of its stages.

    Args:
      readings: of the test images, for explorer.html.
      output: the directory for `figures/` and the pages; None means the workdir.

    Raises:
      HeadSteerError: a file is missing or damaged, or the directory is not writable.
    """
    latents = read_arrays(workdir / "sae/inside.npz")
    latents |= {name: latents[name][:, : config.report.top_images] for name in latents if name.startswith("top_")}
    data = ReportData(
        config,
        dataset,
        summary=read_json(workdir / "summary.json"),
        arrays=to_arrays(read_sweep(workdir / "sweep.nc")),
        rows=read_log(workdir / "train/metrics.jsonl"),
        gates=_read_gates(config, workdir, "train/gates.npz"),
        steered=_read_gates(config, workdir, "steer/gates.npz"),
    )
    output = make_directory(output or workdir.path)  # nothing is written unless everything could be read
    write_latents_page(output / "latents.html", workdir.name, latents, dataset, config)
    write_explorer(output / "explorer.html", workdir.name, config, dataset, data.arrays, readings, data.gates)
    write_report(data, workdir.name, output)


def _read_gates(config: Config, workdir: Workdir, name: str) -> ImageGates | None:
    """Read the gates of the test images; None if the run has none in this file, as those of older versions."""
    return unpack_gates(read_arrays(workdir / name), config) if (workdir / name).exists() else None


def write_report(m: ReportData, name: str, directory: Path) -> None:
    """Write figures/NAME.png and NAME.svg, and report.html, which holds the SVGs, into a directory.

    Args:
      name: the run's name, for the title.
    """
    figures = make_directory(directory / "figures")
    images = {}
    for figure in FIGURES:
        files = render_figure(m, figure)
        for kind in ("png", "svg"):
            path = figures / f"{figure}.{kind}"
            if files is None:
                path.unlink(missing_ok=True)  # an earlier report may have left one
            else:
                write_bytes(path, files[kind])
        if files is not None:
            images[figure] = "data:image/svg+xml;base64," + base64.b64encode(files["svg"]).decode()
    cost = measure_compute(m.config, len(m.dataset.class_names), m.gates.gates) if m.gates else None
    page = render_template(
        "report.html.j2", name=name, config=m.config, fields=flatten(m.config), summary=m.summary, images=images,
        cost=cost, steered=m.steered is not None, gates=m.gates_word,
        gate_ids=[name.removeprefix("h") for name in m.gate_names],
        strategies=list(m.colours), main=m.main, test_images=m.images,
        classes=int((m.arrays["test_count"] > 0).sum()), heads=m.arrays["test_heads_on"].shape[-1],
    )  # fmt: skip
    write_text(directory / "report.html", page)
