"""Steering: which latents to change, what that does to the gates, and the sweep over every setting."""

import importlib

_MOVED = {
    "Mode": "headsteer_jax.steer.steering",
    "Steering": "headsteer_jax.steer.steering",
    "steered_latents": "headsteer_jax.steer.steering",
    "steered_residual": "headsteer_jax.steer.steering",
    "suffix": "headsteer_jax.steer.steering",
    "GateProgram": "headsteer_jax.steer.steering",
    "run_suffix": "headsteer_jax.steer.steering",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
