"""Moved: see the rooms."""

import importlib

_MOVED = {
    "SAELENS_LAYOUT": "headsteer_jax.sae.interchange",
    "SAELENS": "headsteer_jax.sae.interchange",
    "BATCH_TOPK": "headsteer_jax.sae.interchange",
    "OVERCOMPLETE": "headsteer_jax.sae.interchange",
    "LINEAR": "headsteer_jax.sae.interchange",
    "DICTIONARY": "headsteer_jax.sae.interchange",
    "OVERCOMPLETE_TENSORS": "headsteer_jax.sae.interchange",
    "CONSTANT": "headsteer_jax.sae.interchange",
    "Imported": "headsteer_jax.sae.interchange",
    "export_saelens": "headsteer_jax.sae.interchange",
    "import_saelens": "headsteer_jax.sae.interchange",
    "export_overcomplete": "headsteer_jax.sae.interchange",
    "import_overcomplete": "headsteer_jax.sae.interchange",
    "_bytes": "headsteer_jax.sae.interchange",
    "_read": "headsteer_jax.sae.interchange",
    "_take": "headsteer_jax.sae.interchange",
    "_object": "headsteer_jax.sae.interchange",
    "_whole": "headsteer_jax.sae.interchange",
    "_imported": "headsteer_jax.sae.interchange",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
