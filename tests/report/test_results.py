"""The command in a results page: a shell and the command line read it as the config that it stands for."""

import re
import shlex
from pathlib import Path

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from made_run import made_run

from headsteer_jax.config import Config
from headsteer_jax.config.files import flatten, override
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.report.claims import word_verdict
from headsteer_jax.report.results import check_results_page, format_run_command, render_results

CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
NAMES = st.text(CHARACTERS | st.sampled_from(" ,[]|=\"'\\$`\n"), max_size=8)


@given(st.lists(NAMES, max_size=4, unique=True), NAMES, st.booleans(), st.floats(0.01, 1))
def test_the_command_gives_the_config(names: list[str], path: str, flip: bool, target: float) -> None:
    config = Config().model_copy(
        update={
            "steer": Config().steer.model_copy(update={"classes": tuple(names)}),
            "data": Config().data.model_copy(update={"path": path, "flip": flip, "related": tuple(names)}),
            "gate": Config().gate.model_copy(update={"target": target}),
        }
    )
    words = shlex.split(format_run_command(config, "my run", Config(), "a b.py").replace(" \\\n", "\n", 1))
    assert words[:4] == ["headsteer", "run", "--config=a b.py", "--workdir=runs/my run"]
    read = Config()
    for word in words[4:]:
        if word != "\n":
            name, _, text = word.removeprefix("--config.").partition("=")
            read = override(read, name, text)
    assert flatten(read) == flatten(config)


def test_a_results_page_replaces_no_page_or_figure_of_another_program(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "paper.md"
    (page.parent / "paper").mkdir(parents=True)
    check_results_page(epath.Path(page))
    page.write_text("# Notes\n\nThe pages are made by `headsteer page RUN --results=PAGE.md`.\n")
    with pytest.raises(HeadSteerError, match=r"paper\.md: exists, and HeadSteer did not write it"):
        check_results_page(epath.Path(page))
    page.unlink()
    (page.parent / "paper" / "photo.png").write_text("the user's")
    with pytest.raises(HeadSteerError, match=r"photo\.png: exists, but .*paper\.md does not"):
        check_results_page(epath.Path(page))
    page.write_text("# Results on digits\n\n*Generated from `summary.json` by `headsteer page ...`; do not edit.*\n")
    check_results_page(epath.Path(page))


def test_the_page_tells_the_paper_from_what_the_autoencoder_adds() -> None:
    """A claim that does not hold says whether its opposite is shown, and only the run's strategies are described."""
    summary = made_run(strategies=("class", "global", "gate_aligned", "mean_difference", "random_direction"))["summary"]
    text = render_results(summary, "run", "headsteer page", "headsteer run")
    headings = ["\n### The paper's claims\n", "\n### What the autoencoder adds\n"]
    headings += ["\n### What steering adds to plain pruning\n", "\n### Further strategies\n"]
    begins = [*map(text.index, headings), text.index("\n## Strategies\n")]
    assert begins == sorted(begins)
    for claim in summary["claims"]:
        (row,) = (line for line in text.splitlines() if line.startswith(f"| {claim['claim']} "))
        verdict = word_verdict(claim["claim"], claim["interval"], claim["holds"])
        assert row.endswith(f" | {verdict} |" if claim["holds"] in (None, True) else f" | **{verdict}** |")
        group = ("paper", "autoencoder", "pruning", "further").index(claim["about"])
        assert begins[group] < text.index(row) < begins[group + 1]
        assert f"- {claim['claim']}: {verdict}, " in text or claim["holds"] in (None, True)
    described = re.findall(r"^- \*(.+?)\* ", text, re.MULTILINE)
    assert described == ["class", "global", "gate aligned", "mean difference", "random direction"]
