"""Figures do not depend on a user's matplotlib, and leave it as it was."""

import matplotlib
import numpy as np
import pytest
from made_run import made_run
from matplotlib import pyplot

from headsteer_jax.report.figures import render_figure
from headsteer_jax.report.style import ReportData

HOSTILE = {
    "text.usetex": True,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 2.0,
    "savefig.transparent": True,
    "image.origin": "lower",
    "image.cmap": "gray",
    "figure.constrained_layout.use": True,
    "figure.dpi": 33.0,
    "axes.facecolor": "black",
    "axes.xmargin": 0.4,
    "axes.unicode_minus": False,
    "axes.formatter.use_locale": True,
    "lines.linestyle": "--",
    "xtick.bottom": False,
    "path.sketch": (1.0, 100.0, 2.0),
    "font.family": ["serif"],
    "svg.image_inline": False,
    "errorbar.capsize": 9.0,
    "legend.loc": "lower left",
}


@pytest.fixture(scope="module")
def data() -> ReportData:
    made = made_run()
    return ReportData(*(made[name] for name in ("config", "dataset", "summary", "arrays", "rows")))


@pytest.mark.parametrize("name", ["steering", "front", "latents", "training", "overlap"])
def test_the_users_settings_do_not_count(name: str, data: ReportData) -> None:
    plain = render_figure(data, name)
    with matplotlib.rc_context(HOSTILE):
        pyplot.figure()
        assert render_figure(data, name) == plain
        assert {key: matplotlib.rcParams[key] for key in HOSTILE} == HOSTILE
        pyplot.close("all")
    assert np.size(pyplot.get_fignums()) == 0
