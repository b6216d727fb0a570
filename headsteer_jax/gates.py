"""Moved: see the rooms."""

import importlib

_MOVED = {
    "Gate": "headsteer_jax.model.gates",
    "threshold": "headsteer_jax.model.gates",
    "logistic_noise": "headsteer_jax.model.gates",
    "straight_through": "headsteer_jax.model.gates",
    "usage_loss": "headsteer_jax.model.gates",
    "annealed": "headsteer_jax.model.gates",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
