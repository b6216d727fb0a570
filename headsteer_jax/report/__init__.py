"""What people look at: figures, the report page, the page of latents, and results pages for the documentation."""

import importlib

_MOVED = {
    "WIDTH": "headsteer_jax.report.style",
    "MATRIX_CLASSES": "headsteer_jax.report.style",
    "MONTAGE_CLASSES": "headsteer_jax.report.style",
    "TILE": "headsteer_jax.report.style",
    "COLOURS": "headsteer_jax.report.style",
    "MORE_COLOURS": "headsteer_jax.report.style",
    "PHASE_COLOURS": "headsteer_jax.report.style",
    "INK": "headsteer_jax.report.style",
    "MUTED": "headsteer_jax.report.style",
    "PALE": "headsteer_jax.report.style",
    "STYLE": "headsteer_jax.report.style",
    "Material": "headsteer_jax.report.style",
    "short": "headsteer_jax.report.style",
    "number": "headsteer_jax.report.style",
    "signed": "headsteer_jax.report.style",
    "heads_text": "headsteer_jax.report.style",
    "spread": "headsteer_jax.report.style",
    "alpha_axis": "headsteer_jax.report.style",
    "ticks": "headsteer_jax.report.style",
    "plain": "headsteer_jax.report.style",
    "styled": "headsteer_jax.report.style",
    "write_report": "headsteer_jax.report.page",
    "heads_on": "headsteer_jax.report.figures",
    "steering": "headsteer_jax.report.figures",
    "front": "headsteer_jax.report.figures",
    "_around": "headsteer_jax.report.figures",
    "heads": "headsteer_jax.report.figures",
    "overlap": "headsteer_jax.report.figures",
    "savers": "headsteer_jax.report.figures",
    "_strip": "headsteer_jax.report.figures",
    "latents": "headsteer_jax.report.figures",
    "layers": "headsteer_jax.report.figures",
    "_series": "headsteer_jax.report.figures",
    "training": "headsteer_jax.report.figures",
    "grid": "headsteer_jax.report.figures",
    "sae": "headsteer_jax.report.figures",
    "FIGURES": "headsteer_jax.report.figures",
    "draw": "headsteer_jax.report.figures",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
