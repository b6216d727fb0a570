"""Moved: see the rooms."""

import importlib

_MOVED = {
    "CURVES": "headsteer_jax.sae.train",
    "OF_MEMBERS": "headsteer_jax.sae.train",
    "Members": "headsteer_jax.sae.train",
    "SAEState": "headsteer_jax.sae.train",
    "seeds": "headsteer_jax.sae.train",
    "rate_at": "headsteer_jax.sae.train",
    "of_members": "headsteer_jax.sae.train",
    "make_epochs": "headsteer_jax.sae.train",
    "_threshold": "headsteer_jax.sae.train",
    "initial_state": "headsteer_jax.sae.train",
    "dealt_out": "headsteer_jax.sae.train",
    "saved": "headsteer_jax.sae.train",
    "resumed": "headsteer_jax.sae.train",
    "Trained": "headsteer_jax.sae.train",
    "train_members": "headsteer_jax.sae.train",
    "grid": "headsteer_jax.sae.grid",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
