"""Moved: see the rooms."""

import importlib

_MOVED = {
    "SAMPLE": "headsteer_jax.data.dataset",
    "_sha256": "headsteer_jax.data.dataset",
    "data_fingerprint": "headsteer_jax.data.dataset",
    "Tokens": "headsteer_jax.sae.residuals",
    "Directory": "headsteer_jax.sae.residuals",
    "FORMAT": "headsteer_jax.sae.residuals",
    "SHARD_BYTES": "headsteer_jax.sae.residuals",
    "BLOCKS": "headsteer_jax.sae.residuals",
    "CALL_BYTES": "headsteer_jax.sae.residuals",
    "RETRIES": "headsteer_jax.sae.residuals",
    "PATIENCE": "headsteer_jax.sae.residuals",
    "Residuals": "headsteer_jax.sae.residuals",
    "Held": "headsteer_jax.sae.residuals",
    "Stored": "headsteer_jax.sae.residuals",
    "Place": "headsteer_jax.sae.residuals",
    "_place": "headsteer_jax.sae.residuals",
    "READING": "headsteer_jax.sae.residuals",
    "WRITING": "headsteer_jax.sae.residuals",
    "UNREACHABLE": "headsteer_jax.sae.residuals",
    "_blaming": "headsteer_jax.sae.residuals",
    "_files": "headsteer_jax.sae.residuals",
    "ingredients": "headsteer_jax.sae.residuals",
    "fingerprint": "headsteer_jax.sae.residuals",
    "_shape": "headsteer_jax.sae.residuals",
    "_kept": "headsteer_jax.sae.residuals",
    "_program": "headsteer_jax.sae.residuals",
    "_layout": "headsteer_jax.sae.residuals",
    "_open": "headsteer_jax.sae.residuals",
    "_shards": "headsteer_jax.sae.residuals",
    "_meta": "headsteer_jax.sae.residuals",
    "_regrouped": "headsteer_jax.sae.residuals",
    "write_cache": "headsteer_jax.sae.residuals",
    "open_cache": "headsteer_jax.sae.residuals",
    "cached": "headsteer_jax.sae.residuals",
    "_say_stale": "headsteer_jax.sae.residuals",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
