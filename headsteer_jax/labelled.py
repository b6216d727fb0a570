"""Moved: see the rooms."""

import importlib

_MOVED = {
    "SETTING": "headsteer_jax.analysis.sweep_file",
    "DIMENSIONS": "headsteer_jax.analysis.sweep_file",
    "COORDINATES": "headsteer_jax.analysis.sweep_file",
    "_dimensions": "headsteer_jax.analysis.sweep_file",
    "labelled": "headsteer_jax.analysis.sweep_file",
    "plain": "headsteer_jax.analysis.sweep_file",
    "write_sweep": "headsteer_jax.analysis.sweep_file",
    "read_sweep": "headsteer_jax.analysis.sweep_file",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
