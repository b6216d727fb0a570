"""Moved: see the rooms."""

import importlib

_MOVED = {
    "residuals": "headsteer_jax.analysis.layers",
    "all_off": "headsteer_jax.analysis.layers",
    "_some": "headsteer_jax.analysis.layers",
    "_row": "headsteer_jax.analysis.layers",
    "profile": "headsteer_jax.analysis.layers",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
