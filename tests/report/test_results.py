"""The command in a results page: a shell and the command line read it as the config that it stands for."""

import shlex

from hypothesis import given
from hypothesis import strategies as st

from headsteer_jax.config import Config
from headsteer_jax.config.files import flatten, override
from headsteer_jax.report.results import format_run_command

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
