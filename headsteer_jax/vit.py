"""Moved: see the rooms."""

import importlib

_MOVED = {
    "Gating": "headsteer_jax.model.vit",
    "Patches": "headsteer_jax.model.vit",
    "Block": "headsteer_jax.model.vit",
    "exact_gelu": "headsteer_jax.model.vit",
    "_rows": "headsteer_jax.model.vit",
    "sin_cos_positions": "headsteer_jax.model.vit",
    "ViT": "headsteer_jax.model.vit",
    "answer": "headsteer_jax.model.vit",
    "model_fingerprint": "headsteer_jax.model.vit",
    "build": "headsteer_jax.model.vit",
    "stack_gates": "headsteer_jax.model.vit",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
