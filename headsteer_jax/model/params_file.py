"""A model's parameters in one .safetensors file: what a run on the hub has in place of its checkpoints."""

import json
from typing import Any

import jax
import numpy as np
from etils.epath import Path
from safetensors.numpy import load, save

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.vit import fingerprint_params
from headsteer_jax.runtime.files import REMAKE

PARAMS_FILE = "params.safetensors"
FINGERPRINT = "headsteer_fingerprint"  # the file's metadata have the parameters' fingerprint under this name


def _name_leaves(params: Any) -> dict[str, Any]:
    """Name every array of a pytree by its place, such as params/layers_0/query/kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def encode_params(params: Any) -> bytes:
    """Encode parameters as the content of a .safetensors file, with their fingerprint."""
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in _name_leaves(params).items()}
    return save(tensors, {FINGERPRINT: fingerprint_params(params)})


def read_params(path: Path, like: Any) -> Any:
    """Read parameters from a file, as NumPy arrays, and compare them with their fingerprint.

    Args:
      like: a pytree of the parameters' shapes and dtypes.

    Raises:
      HeadSteerError: the file is missing or damaged, or belongs to another model.
    """
    try:
        content = path.read_bytes()
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        fingerprint = header["__metadata__"][FINGERPRINT]
    except Exception as error:  # a truncated file fails in many ways
        raise HeadSteerError(f"{path}: missing or damaged ({error}); {REMAKE}") from None
    expected = {name: (leaf.shape, leaf.dtype) for name, leaf in _name_leaves(like).items()}
    if {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} != expected:
        raise HeadSteerError(f"{path}: belongs to another model than this run's config describes; {REMAKE}")
    params = jax.tree.unflatten(jax.tree.structure(like), [tensors[name] for name in expected])
    if fingerprint_params(params) != fingerprint:
        raise HeadSteerError(f"{path}: damaged (its fingerprint is wrong); {REMAKE}")
    return params
