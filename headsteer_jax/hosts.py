"""Moved: see the rooms."""

import importlib

_MOVED = {
    "T": "headsteer_jax.runtime.hosts",
    "PATIENCE": "headsteer_jax.runtime.hosts",
    "CLUSTERS": "headsteer_jax.runtime.hosts",
    "start": "headsteer_jax.runtime.hosts",
    "count": "headsteer_jax.runtime.hosts",
    "is_first": "headsteer_jax.runtime.hosts",
    "wait_for_all": "headsteer_jax.runtime.hosts",
    "exchanged": "headsteer_jax.runtime.hosts",
    "_attempted": "headsteer_jax.runtime.hosts",
    "first": "headsteer_jax.runtime.hosts",
    "everywhere": "headsteer_jax.runtime.hosts",
    "check_equal": "headsteer_jax.runtime.hosts",
    "wait_to_leave": "headsteer_jax.runtime.hosts",
    "share": "headsteer_jax.runtime.hosts",
    "joined": "headsteer_jax.runtime.hosts",
    "fetched": "headsteer_jax.runtime.hosts",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
