"""Moved: see the rooms."""

import importlib

_MOVED = {
    "RESUME": "headsteer_jax.runtime.preemption",
    "LINE": "headsteer_jax.runtime.preemption",
    "Preempted": "headsteer_jax.runtime.preemption",
    "Handler": "headsteer_jax.runtime.preemption",
    "install": "headsteer_jax.runtime.preemption",
    "_handler": "headsteer_jax.runtime.preemption",
    "check": "headsteer_jax.runtime.preemption",
    "at_checkpoints": "headsteer_jax.runtime.preemption",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
