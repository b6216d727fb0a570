"""Moved: see the rooms."""

import importlib

_MOVED = {
    "BATCH": "headsteer_jax.runtime.mesh",
    "SMALL": "headsteer_jax.runtime.mesh",
    "_row": "headsteer_jax.runtime.mesh",
    "training_mesh": "headsteer_jax.runtime.mesh",
    "check_batch": "headsteer_jax.runtime.mesh",
    "over_batch": "headsteer_jax.runtime.mesh",
    "everywhere": "headsteer_jax.runtime.mesh",
    "of_state": "headsteer_jax.runtime.mesh",
    "placed": "headsteer_jax.runtime.mesh",
    "own_rows": "headsteer_jax.runtime.mesh",
    "local_mesh": "headsteer_jax.runtime.mesh",
    "members_mesh": "headsteer_jax.runtime.mesh",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
