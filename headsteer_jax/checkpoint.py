"""Moved: see the rooms."""

import importlib

_MOVED = {
    "AnyPath": "headsteer_jax.runtime.files",
    "MEND": "headsteer_jax.runtime.files",
    "explained": "headsteer_jax.runtime.files",
    "in_bucket": "headsteer_jax.runtime.files",
    "make_directory": "headsteer_jax.runtime.files",
    "remove_directory": "headsteer_jax.runtime.files",
    "write_atomically": "headsteer_jax.runtime.files",
    "write_bytes": "headsteer_jax.runtime.files",
    "write_text": "headsteer_jax.runtime.files",
    "write_json": "headsteer_jax.runtime.files",
    "write_arrays": "headsteer_jax.runtime.files",
    "read_json": "headsteer_jax.runtime.files",
    "read_arrays": "headsteer_jax.runtime.files",
    "BEAT": "headsteer_jax.runtime.lock",
    "locked": "headsteer_jax.runtime.lock",
    "Tree": "headsteer_jax.runtime.checkpoint",
    "FORMAT": "headsteer_jax.runtime.checkpoint",
    "_once": "headsteer_jax.runtime.checkpoint",
    "_crc32": "headsteer_jax.runtime.checkpoint",
    "_sums": "headsteer_jax.runtime.checkpoint",
    "Damaged": "headsteer_jax.runtime.checkpoint",
    "_Manager": "headsteer_jax.runtime.checkpoint",
    "PASSING": "headsteer_jax.runtime.checkpoint",
    "_passing": "headsteer_jax.runtime.checkpoint",
    "Checkpoints": "headsteer_jax.runtime.checkpoint",
    "Path": "etils.epath",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
