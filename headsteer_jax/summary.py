"""Moved: see the rooms."""

import importlib

_MOVED = {
    "_gap_at_equal_usage": "headsteer_jax.analysis.claims",
    "_claims": "headsteer_jax.analysis.claims",
    "_pair": "headsteer_jax.analysis.stats",
    "Arrays": "headsteer_jax.analysis.summary",
    "_curves": "headsteer_jax.analysis.summary",
    "_class_curves": "headsteer_jax.analysis.summary",
    "_unsteered": "headsteer_jax.analysis.summary",
    "saved_classes": "headsteer_jax.analysis.summary",
    "summarise": "headsteer_jax.analysis.summary",
    "_exact": "headsteer_jax.analysis.summary",
    "_exact_curves": "headsteer_jax.analysis.summary",
    "_against_oracle": "headsteer_jax.analysis.summary",
    "_by_relation": "headsteer_jax.analysis.summary",
    "_overlaps": "headsteer_jax.analysis.summary",
    "_heads_after": "headsteer_jax.analysis.summary",
    "_related_heads": "headsteer_jax.analysis.summary",
    "_group": "headsteer_jax.analysis.summary",
    "_fronts": "headsteer_jax.analysis.summary",
    "_class_table": "headsteer_jax.analysis.summary",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
