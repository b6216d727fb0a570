"""The notebook of the documentation runs from its first cell to its last, on the tiny run of these tests."""

from pathlib import Path

import pytest
from helpers import ROOT, FinishedRun, environment


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(
    finished: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat, which reads notebooks, is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient, which runs notebooks, is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel, which runs the cells of notebooks, is not installed")
    workdir = finished.copy(tmp_path)
    notebook = nbformat.read(ROOT / "docs/tutorial.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # they belong to whoever runs it
    settings = [cell for cell in notebook.cells if cell.source.startswith("RUN = ")]
    assert len(settings) == 1
    settings[0].source = f"RUN, CONFIG, FIELDS = {str(workdir)!r}, {str(finished.config)!r}, {{}}"
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # so that figures are drawn into the notebook
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    (training,) = [cell for cell in notebook.cells if "-m headsteer_jax" in cell.source]
    printed = "".join(output.get("text", "") for output in training.outputs)
    assert "train: done before" in printed, printed  # so the command was found, and with this run
    assert f"{workdir}/report.html" in printed
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("<iframe srcdoc=" in data.get("text/html", "") for data in shown)
    assert sum("image/png" in data for data in shown) == 2
