"""Moved: see the rooms."""

import importlib

_MOVED = {
    "CALLS": "headsteer_jax.model.passes",
    "Observed": "headsteer_jax.model.passes",
    "Observe": "headsteer_jax.model.passes",
    "Function": "headsteer_jax.model.passes",
    "Program": "headsteer_jax.model.passes",
    "dealt": "headsteer_jax.model.passes",
    "replicated": "headsteer_jax.model.passes",
    "per_image": "headsteer_jax.model.passes",
    "Fit": "headsteer_jax.model.passes",
    "largest": "headsteer_jax.model.passes",
    "too_small": "headsteer_jax.model.passes",
    "fitted": "headsteer_jax.model.passes",
    "padded_chunks": "headsteer_jax.model.passes",
    "passes": "headsteer_jax.model.passes",
    "over_split": "headsteer_jax.model.passes",
    "observer": "headsteer_jax.model.passes",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
