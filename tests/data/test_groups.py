"""Groups of related classes: names may hold any character."""

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from headsteer_jax.data.dataset import related_pairs

NAMES = st.text(st.characters() | st.sampled_from("|=\\ ,"), min_size=1, max_size=6)


@given(st.lists(NAMES, min_size=4, max_size=4, unique=True), NAMES)
def test_any_names_can_be_grouped(names: list[str], title: str) -> None:
    title, *escaped = (re.sub(r"([|=\\])", r"\\\1", name) for name in (title, *names))
    pairs = related_pairs([f"{title}={escaped[2]}|{escaped[0]}", f"x={escaped[0]}|{escaped[3]}"], tuple(names))
    expected = np.zeros((4, 4), bool)
    expected[[0, 2, 0, 3], [2, 0, 3, 0]] = True
    np.testing.assert_array_equal(pairs, expected)


def test_plain_names_need_no_backslash() -> None:
    pairs = related_pairs(["g = a=b | c\\d | e "], ("a=b", "c\\d", "e"))
    np.testing.assert_array_equal(pairs, ~np.eye(3, dtype=bool))
