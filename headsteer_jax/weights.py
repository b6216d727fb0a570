"""Moved: see the rooms."""

import importlib

_MOVED = {
    "SUFFIXES": "headsteer_jax.model.weights",
    "Layout": "headsteer_jax.model.weights",
    "TORCH": "headsteer_jax.model.weights",
    "TIMM": "headsteer_jax.model.weights",
    "DINOV2": "headsteer_jax.model.weights",
    "HF_VIT": "headsteer_jax.model.weights",
    "HF_DINOV2": "headsteer_jax.model.weights",
    "_BLOCK": "headsteer_jax.model.weights",
    "AUGREG": "headsteer_jax.model.weights",
    "PREFIXES": "headsteer_jax.model.weights",
    "find": "headsteer_jax.model.weights",
    "read": "headsteer_jax.model.weights",
    "_read_npz": "headsteer_jax.model.weights",
    "_read_torch": "headsteer_jax.model.weights",
    "recognise": "headsteer_jax.model.weights",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
