"""Moved: see the rooms."""

import importlib

_MOVED = {
    "BLOCK": "headsteer_jax.steer.table",
    "pattern_of": "headsteer_jax.steer.table",
    "gates_of": "headsteer_jax.steer.table",
    "listed_patterns": "headsteer_jax.steer.table",
    "pattern_answers": "headsteer_jax.steer.table",
    "Table": "headsteer_jax.steer.table",
    "table_program": "headsteer_jax.steer.table",
    "fill_table": "headsteer_jax.steer.table",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
