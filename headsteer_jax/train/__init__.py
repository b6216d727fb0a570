"""Training the gated vision transformer: one step, the loop over steps, and the log."""

import importlib

_MOVED = {
    "batches": "headsteer_jax.data.batches",
    "State": "headsteer_jax.train.step",
    "evaluated": "headsteer_jax.train.step",
    "optimizer": "headsteer_jax.train.step",
    "scale_gates": "headsteer_jax.train.step",
    "loss_and_metrics": "headsteer_jax.train.step",
    "make_steps": "headsteer_jax.train.step",
    "Log": "headsteer_jax.train.log",
    "read_log": "headsteer_jax.train.log",
    "_logging": "headsteer_jax.train.log",
    "Phase": "headsteer_jax.train.loop",
    "PHASES": "headsteer_jax.train.loop",
    "GATING": "headsteer_jax.train.loop",
    "initial_params": "headsteer_jax.train.loop",
    "initial_state": "headsteer_jax.train.loop",
    "fit": "headsteer_jax.train.loop",
    "_traced": "headsteer_jax.train.loop",
    "validate": "headsteer_jax.train.loop",
    "train": "headsteer_jax.train.loop",
    "trained": "headsteer_jax.train.loop",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
