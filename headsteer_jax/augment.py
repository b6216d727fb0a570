"""Moved: see the rooms."""

import importlib

_MOVED = {
    "preprocess": "headsteer_jax.data.augment",
    "training_images": "headsteer_jax.data.augment",
    "_square": "headsteer_jax.data.augment",
    "_normalised": "headsteer_jax.data.augment",
    "augment": "headsteer_jax.data.augment",
    "_random_square": "headsteer_jax.data.augment",
    "OPERATIONS": "headsteer_jax.data.augment",
    "GEOMETRIC": "headsteer_jax.data.augment",
    "_random_operation": "headsteer_jax.data.augment",
    "operation": "headsteer_jax.data.augment",
    "mixup": "headsteer_jax.data.augment",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
