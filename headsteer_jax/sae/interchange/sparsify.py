"""Import of autoencoders of EleutherAI's sparsify: a directory with cfg.json and sae.safetensors.

Source: eai-sparsify 1.3.3 (sparse_coder.py, fused_encoder.py, trainer.py), which produced tests/goldens/sparsify*.
Axes: D width, F latents.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.sae.interchange.files import (
    Imported,
    Parameters,
    read_object,
    read_tensors,
    take_integer,
    take_tensor,
    to_autoencoder,
)
from headsteer_jax.sae.interchange.provenance import BLOCK, OTHER_PLACES, Provenance, of_hook, read_text

# settings that change the result: the default, which is the only supported value, and what other values mean
SETTINGS = {
    "activation": ("topk", "latents that compete within groups (groupmax), not for the k largest"),
    "signed": (False, "latents that may be negative"),
    "transcode": (False, "a transcoder, which predicts the output of a module from its input"),
    "skip_connection": (False, "a transcoder with a skip connection"),
}
# normalize_decoder and multi_topk affect only the training


def import_sparsify(directory: Path, width: int | None = None) -> Imported:
    """Import a sparse coder of sparsify, as its encode and decode compute it. Weights of any dtype become float32.

    Args:
      directory: holds cfg.json and sae.safetensors. Its name is the module whose output the autoencoder reads, and
        beside it there may be the training's config.json.
      width: of the model's residuals, if it is to be checked.

    Raises:
      HeadSteerError: a file is missing or damaged, a setting is not supported, a tensor is missing, surplus, misshapen
        or not finite, or the width is another.
    """
    config, path = directory / "cfg.json", directory / "sae.safetensors"
    c = read_object(config, "choose a directory of sparsify with cfg.json and sae.safetensors")
    for name, (supported, meaning) in SETTINGS.items():
        if (value := c.get(name, supported)) != supported:
            raise HeadSteerError(f"{config}: {name} = {value!r}: {meaning}; it must be {supported}: choose another")
    D = take_integer(config, c, "d_in")
    # as SparseCoder: num_latents, or if it is 0 the width times expansion_factor, by default 32
    F = take_integer(config, c, "num_latents") if c.get("num_latents") else D * _read_expansion(config, c)
    k = take_integer(config, {"k": 32, **c}, "k", F)

    tensors = read_tensors(path)
    shapes = {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)}
    if "W_skip" in tensors:
        raise HeadSteerError(f"{path}: tensor 'W_skip': it is {SETTINGS['skip_connection'][1]}; choose another")
    if surplus := sorted(set(tensors) - set(shapes)):
        raise HeadSteerError(f"{path}: a sparse coder has no place for the tensor {surplus[0]!r}; choose another")
    W_e, b_e, W_d, b_d = (take_tensor(path, tensors, name, shape) for name, shape in shapes.items())
    parameters = Parameters(W_e, b_e, W_d, b_d, np.zeros(F), subtracts_b_d=True)
    return to_autoencoder(path, parameters, "topk", k, _read_provenance(directory), width)


def _read_expansion(path: Path, c: Mapping[str, Any]) -> int:
    return take_integer(path, {"expansion_factor": 32, **c}, "expansion_factor")


def _read_provenance(directory: Path) -> Provenance:
    """Read the hook from the directory's name, and model and dataset from the training's config.json beside it."""
    name = directory.resolve().name
    provenance = of_hook(name if BLOCK.search(name) or OTHER_PLACES.search(name) else None)
    for parent in directory.resolve().parents[:2]:  # for an autoencoder in best/ it is one directory further up
        with contextlib.suppress(HeadSteerError):  # any other config.json, perhaps of something else
            c = read_object(parent / "config.json", "")
            return provenance._replace(model=read_text(c, "model"), dataset=read_text(c, "dataset"))
    return provenance
