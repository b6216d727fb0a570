"""Moved: see the rooms."""

import importlib

_MOVED = {
    "Arrays": "headsteer_jax.sae.latents",
    "ROWS": "headsteer_jax.sae.latents",
    "Top": "headsteer_jax.sae.latents",
    "_with_more": "headsteer_jax.sae.latents",
    "_encoded": "headsteer_jax.sae.latents",
    "look_inside": "headsteer_jax.sae.latents",
    "THUMBNAIL": "headsteer_jax.report.latents",
    "BARS": "headsteer_jax.report.latents",
    "LEVELS": "headsteer_jax.report.latents",
    "_uri": "headsteer_jax.report.latents",
    "_heat": "headsteer_jax.report.latents",
    "_rounded": "headsteer_jax.report.latents",
    "_pictures": "headsteer_jax.report.latents",
    "page_data": "headsteer_jax.report.latents",
    "write_inside": "headsteer_jax.report.latents",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
