"""Moved: see the rooms."""

import importlib

_MOVED = {
    "Loaded": "headsteer_jax.model.pretrained",
    "resample_positions": "headsteer_jax.model.pretrained",
    "resample_patches": "headsteer_jax.model.pretrained",
    "load_backbone": "headsteer_jax.model.pretrained",
    "timm_tensors": "headsteer_jax.model.pretrained",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
