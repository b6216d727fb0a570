"""Moved: see the rooms."""

import importlib

_MOVED = {
    "Outcomes": "headsteer_jax.steer.strategies",
    "LatentStatistics": "headsteer_jax.steer.strategies",
    "Choice": "headsteer_jax.steer.strategies",
    "Strategy": "headsteer_jax.steer.strategies",
    "ClassStrategy": "headsteer_jax.steer.strategies",
    "statistics": "headsteer_jax.steer.strategies",
    "_eligible": "headsteer_jax.steer.strategies",
    "_most_frequent": "headsteer_jax.steer.strategies",
    "class_frequent": "headsteer_jax.steer.strategies",
    "global_frequent": "headsteer_jax.steer.strategies",
    "random": "headsteer_jax.steer.strategies",
    "matched_random": "headsteer_jax.steer.strategies",
    "shift_norm": "headsteer_jax.steer.strategies",
    "gate_aligned": "headsteer_jax.steer.strategies",
    "_smallest_weights": "headsteer_jax.steer.strategies",
    "wanted_push": "headsteer_jax.steer.strategies",
    "wanted_heads": "headsteer_jax.steer.strategies",
    "STRATEGIES": "headsteer_jax.steer.strategies",
    "strategy": "headsteer_jax.steer.strategies",
    "per_class": "headsteer_jax.steer.strategies",
    "overlap": "headsteer_jax.steer.strategies",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
