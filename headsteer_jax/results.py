"""Moved: see the rooms."""

import importlib

_MOVED = {
    "run_command": "headsteer_jax.report.results",
    "page": "headsteer_jax.report.results",
    "write_page": "headsteer_jax.report.results",
    "main": "headsteer_jax.report.results",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
