"""Moved: see the rooms."""

import importlib

_MOVED = {
    "PLAIN_SECONDS": "headsteer_jax.runtime.progress",
    "Progress": "headsteer_jax.runtime.progress",
    "progress": "headsteer_jax.runtime.progress",
    "say": "headsteer_jax.runtime.progress",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
