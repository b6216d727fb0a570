"""Moved: see the rooms."""

import importlib

_MOVED = {
    "MATCHED": "headsteer_jax.sae.metrics",
    "Health": "headsteer_jax.sae.metrics",
    "health": "headsteer_jax.sae.metrics",
    "max_cosines": "headsteer_jax.sae.metrics",
    "class_means": "headsteer_jax.sae.metrics",
    "class_selectivity": "headsteer_jax.sae.metrics",
    "of_latents": "headsteer_jax.sae.metrics",
    "matched_cosine": "headsteer_jax.sae.metrics",
    "stability": "headsteer_jax.sae.metrics",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
