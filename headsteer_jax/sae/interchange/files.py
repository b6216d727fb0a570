"""What all importers share: reading files with their checks, and turning parameters into an autoencoder.

Every setting that changes the result of a file is carried over or refused; arithmetic is in float64. An imported
autoencoder reads residuals as they are in the model: its scaling is mean 0 and scale 1. Axes: D width, F latents.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model import weights
from headsteer_jax.sae.autoencoder import Autoencoder, SAEWeights, Scaling
from headsteer_jax.sae.interchange.provenance import Provenance

# names of tensors that only a transformer has
TRANSFORMER = re.compile(
    r"patch_embed|cls_token|pos_embed|position_embeddings|\.(qkv|query|q_proj|norm1|fc1)\.|embed_tok"
)


class Imported(NamedTuple):
    """An autoencoder of another library, which reads residuals as they are in the model."""

    sae: Autoencoder  # its scaling is mean 0, scale 1
    activation: str  # as in SAEConfig.activation
    k: int | None  # as in SAEConfig.k; None if the file does not state it
    provenance: Provenance


class Parameters(NamedTuple):
    """The parameters of an autoencoder in another library's file, in float64."""

    W_e: np.ndarray  # [F, D]
    b_e: np.ndarray
    W_d: np.ndarray  # [F, D]
    b_d: np.ndarray
    threshold: np.ndarray  # [F]
    subtracts_b_d: bool  # from the encoder's input, as ours does


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
      remedy: what to do if it is not there.

    Raises:
      HeadSteerError: it is missing or damaged, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        fault = f"cannot be read ({error.strerror})" if path.exists() else "no such file"
        raise HeadSteerError(f"{path}: {fault}; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise HeadSteerError(f"{path}: damaged ({error}); download it again") from None
    if not isinstance(content, dict):
        raise HeadSteerError(f"{path}: it holds no JSON object; {remedy}")
    return content


def read_tensors(path: Path, suffixes: tuple[str, ...] = (".safetensors",)) -> dict[str, np.ndarray]:
    """Read the tensors of an autoencoder's file, float32 and finite.

    Raises:
      HeadSteerError: there is no such file, it is damaged, or it holds a transformer.
    """
    if not path.is_file() or path.suffix not in suffixes:
        raise HeadSteerError(f"{path}: no such {' or '.join(suffixes)} file; choose an SAE's file that is there")
    tensors = weights.read_tensors(path)
    if name := find_transformer_tensor(tensors):
        raise HeadSteerError(
            f"{path}: it holds a transformer (tensor {name!r}), not an autoencoder; config.model.pretrained names a "
            "backbone's file, config.sae.pretrained an autoencoder's"
        )
    return tensors


def find_transformer_tensor(names: Iterable[str]) -> str | None:
    """Return the first name of a tensor that only a transformer has; None if there is none."""
    names = list(names)
    if any(name.startswith("dictionary.") for name in names):  # overcomplete's, whose encoders may attend
        return None
    return next(filter(TRANSFORMER.search, names), None)


def take_tensor(path: Path, tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """Return a tensor in float64 after checking its shape, in which None is any length.

    Raises:
      HeadSteerError: there is no such tensor, or it has another shape.
    """
    if name not in tensors:
        raise HeadSteerError(f"{path}: there is no tensor {name!r}, which an SAE of this kind has; save it again")
    actual = tensors[name].shape
    if len(actual) == 3 and len(shape) == 2:
        raise HeadSteerError(
            f"{path}: tensor {name!r} has the shape {list(actual)}: it is a crosscoder, which reads several layers at "
            "once; choose an autoencoder of one layer"
        )
    if len(actual) != len(shape) or any(b not in (a, None) for a, b in zip(actual, shape, strict=True)):
        expected = ", ".join("any" if length is None else str(length) for length in shape)
        raise HeadSteerError(
            f"{path}: tensor {name!r} has the shape {list(actual)}, not [{expected}] as the file's other entries "
            "require; save it again"
        )
    return tensors[name].astype(np.float64)


def take_object(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a JSON object's field that is an object itself; an empty one if it is not."""
    value = values.get(name)
    return value if isinstance(value, dict) else {}


def take_integer(path: Path, values: Mapping[str, Any], name: str, maximum: int | None = None) -> int:
    """Return a JSON object's field that is a positive integer.

    Raises:
      HeadSteerError: it is something else.
    """
    value = values.get(name)
    if type(value) is not int or not 1 <= value <= (maximum or value):
        allowed = f"1 to {maximum}" if maximum else "1 and more"
        raise HeadSteerError(f"{path}: {name} = {value!r}; it must be a whole number, {allowed}: save it again")
    return value


def fold_gate(
    W_FD: np.ndarray, gate_bias_F: np.ndarray, magnitude_bias_F: np.ndarray, log_scale_F: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn a Gated autoencoder (arXiv:2404.16014) into the JumpReLU autoencoder that computes the same.

    A latent is ReLU(e^r W u + b_mag) where W u + b_gate > 0, and so where e^r W u + b_mag > b_mag - e^r b_gate.

    Returns:
      The encoder's rows [F, D], its biases [F], and the thresholds [F].
    """
    scale_F = np.exp(log_scale_F)
    return scale_F[:, None] * W_FD, magnitude_bias_F, magnitude_bias_F - scale_F * gate_bias_F


def unit_rows(parameters: Parameters) -> Parameters:
    """Give the decoder's rows norm 1 and the latents their norms, as libraries do that rescale activations."""
    length_F = np.linalg.norm(parameters.W_d, axis=1)
    return parameters._replace(
        W_e=parameters.W_e * length_F[:, None],
        b_e=parameters.b_e * length_F,
        W_d=parameters.W_d / np.where(length_F > 0, length_F, 1.0)[:, None],
    )


def to_bytes(tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """Return the content of a .safetensors file with float32 tensors."""
    return save({name: np.asarray(value, np.float32, order="C") for name, value in tensors.items()}, metadata)


def to_autoencoder(
    path: Path, parameters: Parameters, activation: str, k: int | None, provenance: Provenance, width: int | None
) -> Imported:
    """Check the width, and make an autoencoder of the parameters.

    Raises:
      HeadSteerError: the width is not the model's, or float32 cannot hold the parameters.
    """
    W_e, b_e, W_d, b_d, threshold, subtracts_b_d = parameters
    D = len(b_d)
    if width not in (None, D):
        raise HeadSteerError(
            f"{path}: it reads residuals of width {D}, but the model's are {width} wide; choose another"
        )
    b_e = b_e if subtracts_b_d else b_e + W_e @ b_d
    values = (W_e, b_e, W_d, b_d, threshold)
    if not all((np.abs(value) < np.finfo(np.float32).max).all() for value in values):
        raise HeadSteerError(f"{path}: its parameters are too large for float32; choose another")
    weights = SAEWeights(*(jnp.asarray(value, jnp.float32) for value in values))
    scaling = Scaling(np.zeros(D, np.float32), np.asarray(1.0, np.float32))
    return Imported(Autoencoder(weights, scaling, k if activation == "topk" else None), activation, k, provenance)
