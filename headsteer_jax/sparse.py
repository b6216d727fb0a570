"""Moved: see the rooms."""

import importlib

_MOVED = {
    "kept": "headsteer_jax.runtime.compiled",
    "keep_programs": "headsteer_jax.runtime.compiled",
    "_processor": "headsteer_jax.runtime.compiled",
    "SOURCE": "headsteer_jax.sae.sparse",
    "FLAGS": "headsteer_jax.sae.sparse",
    "CALLS": "headsteer_jax.sae.sparse",
    "library": "headsteer_jax.sae.sparse",
    "available": "headsteer_jax.sae.sparse",
    "_call": "headsteer_jax.sae.sparse",
    "encode": "headsteer_jax.sae.sparse",
    "_encode": "headsteer_jax.sae.sparse",
    "_encode_vjp": "headsteer_jax.sae.sparse",
    "sum_rows": "headsteer_jax.sae.sparse",
    "_sum_rows": "headsteer_jax.sae.sparse",
    "_sum_rows_vjp": "headsteer_jax.sae.sparse",
    "outer_rows": "headsteer_jax.sae.sparse",
    "fired": "headsteer_jax.sae.sparse",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
