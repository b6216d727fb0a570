"""Moved: see the rooms."""

import importlib

_MOVED = {
    "NAMED_BY": "headsteer_jax.steer.sweep",
    "Arrays": "headsteer_jax.steer.sweep",
    "Way": "headsteer_jax.steer.sweep",
    "way": "headsteer_jax.steer.sweep",
    "why": "headsteer_jax.steer.sweep",
    "alpha_grid": "headsteer_jax.steer.sweep",
    "check_names": "headsteer_jax.steer.sweep",
    "_scored": "headsteer_jax.steer.sweep",
    "_top_images": "headsteer_jax.steer.sweep",
    "_unsteered": "headsteer_jax.steer.sweep",
    "_folds": "headsteer_jax.steer.sweep",
    "_without_fold": "headsteer_jax.steer.sweep",
    "check_validation": "headsteer_jax.steer.sweep",
    "_evidence": "headsteer_jax.steer.sweep",
    "Job": "headsteer_jax.steer.sweep",
    "make_job": "headsteer_jax.steer.sweep",
    "active_latents": "headsteer_jax.steer.sweep",
    "Swept": "headsteer_jax.steer.sweep",
    "by_flips": "headsteer_jax.steer.sweep",
    "by_gates": "headsteer_jax.steer.sweep",
    "by_suffix": "headsteer_jax.steer.sweep",
    "run_sweep": "headsteer_jax.steer.sweep",
    "gate_weights": "headsteer_jax.steer.sweep",
    "_choices": "headsteer_jax.steer.sweep",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
