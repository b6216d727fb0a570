"""Moved: see the rooms."""

import importlib

_MOVED = {
    "PEAKS": "headsteer_jax.model.flops",
    "forward_flops": "headsteer_jax.model.flops",
    "training_flops": "headsteer_jax.model.flops",
    "peak_tflops": "headsteer_jax.model.flops",
    "speed": "headsteer_jax.model.flops",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
