"""Moved: see the rooms."""

import importlib

_MOVED = {
    "class_counts": "headsteer_jax.steer.tally",
    "bootstrap_weights": "headsteer_jax.analysis.stats",
    "bootstrap_means": "headsteer_jax.analysis.stats",
    "interval": "headsteer_jax.analysis.stats",
    "mcnemar": "headsteer_jax.analysis.stats",
    "benjamini_hochberg": "headsteer_jax.analysis.stats",
    "choose_alpha": "headsteer_jax.analysis.stats",
    "accuracy_at_usage": "headsteer_jax.analysis.stats",
    "front": "headsteer_jax.analysis.stats",
    "fewer": "headsteer_jax.analysis.stats",
    "controls": "headsteer_jax.analysis.stats",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
