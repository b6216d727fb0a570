"""Moved: see the rooms."""

import importlib

_MOVED = {
    "ROUNDING": "headsteer_jax.steer.flips",
    "is_affine": "headsteer_jax.steer.flips",
    "GateEffect": "headsteer_jax.steer.flips",
    "gate_effect": "headsteer_jax.steer.flips",
    "Rows": "headsteer_jax.steer.flips",
    "Flips": "headsteer_jax.steer.flips",
    "find_flips": "headsteer_jax.steer.flips",
    "_doubt": "headsteer_jax.steer.flips",
    "_straight": "headsteer_jax.steer.flips",
    "_kinked": "headsteer_jax.steer.flips",
    "Grid": "headsteer_jax.steer.tally",
    "on_grid": "headsteer_jax.steer.tally",
    "Tally": "headsteer_jax.steer.tally",
    "Answers": "headsteer_jax.steer.tally",
    "_walk": "headsteer_jax.steer.tally",
    "look_up": "headsteer_jax.steer.tally",
    "packed": "headsteer_jax.steer.tally",
    "unpacked": "headsteer_jax.steer.tally",
    "tally_of": "headsteer_jax.steer.tally",
    "_correct": "headsteer_jax.steer.tally",
    "Steps": "headsteer_jax.steer.tally",
    "exact_steps": "headsteer_jax.steer.tally",
    "least_alpha": "headsteer_jax.steer.tally",
    "best_alpha": "headsteer_jax.steer.tally",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
