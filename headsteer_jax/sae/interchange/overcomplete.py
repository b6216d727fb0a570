"""Export and import of autoencoders as state_dicts of overcomplete, in .safetensors files with metadata.

An export reads residuals as they are in the model: centre and scale are folded into its weights (`fold_scaling`), so
its latents are ours divided by the scale, and it reconstructs x, not u.

Source: overcomplete 0.3.0 (sae/*.py), which produced tests/goldens/overcomplete*. Axes: D width, F latents.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import safe_open

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime.files import make_directory, write_bytes
from headsteer_jax.sae.autoencoder import Autoencoder, fold_scaling
from headsteer_jax.sae.interchange.files import (
    Imported,
    Parameters,
    read_tensors,
    take_integer,
    take_object,
    take_tensor,
    to_autoencoder,
    to_bytes,
)
from headsteer_jax.sae.interchange.provenance import read_metadata

# what other classes are, for the error message
UNSUPPORTED = {
    "RATopKSAE": "an archetypal SAE, whose dictionary is made of data points",
    "RAJumpSAE": "an archetypal SAE, whose dictionary is made of data points",
    "MpSAE": "an SAE whose encoder is a matching pursuit",
    "OMPSAE": "an SAE whose encoder is an orthogonal matching pursuit",
    "QSAE": "an SAE with quantised latents",
}
OVERCOMPLETE = {"relu": "SAE", "topk": "TopKSAE", "batch_topk": "BatchTopKSAE", "jumprelu": "JumpSAE"}
LINEAR, DICTIONARY = "encoder.final_block.0", "dictionary._weights"
OVERCOMPLETE_TENSORS = {
    f"{LINEAR}.weight", f"{LINEAR}.bias", "encoder.weight", "encoder.bias", "encoder.tied_to._weights",
    "encoder.tied_to.multiplier", DICTIONARY, "dictionary.multiplier", "thresholds",
}  # fmt: skip
CONSTANT_VALUE = 2.0**20  # of the constant concept: above any latent, and a power of two, so that nothing is rounded


def export_overcomplete(
    sae: Autoencoder, activation: str, k: int, path: Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write the state_dict of overcomplete's TopKSAE, BatchTopKSAE, JumpSAE or (relu) SAE.

    The file's metadata name the class and its arguments:

        metadata = json.loads(safetensors.safe_open(path, "pt").metadata()["overcomplete"])
        sae = getattr(overcomplete.sae, metadata["class"])(**metadata["arguments"])
        sae.load_state_dict(safetensors.torch.load_file(path))
        sae.running_threshold = metadata.get("running_threshold")  # BatchTopKSAE's, which is not in its state_dict
        sae.eval()  # after everything else: it fixes the dictionary

    Overcomplete's decoders have no bias. Ours, which holds the training mean, is therefore an additional concept, the
    last one: it is always on, its value is CONSTANT_VALUE, its dictionary row b_d / CONSTANT_VALUE.
    `sae.encode(x)[1][:, :-1]` are our latents, and `sae(x)[2]` is our reconstruction.

    Args:
      sae: one autoencoder (`Autoencoder.member`).
      activation: as in SAEConfig.activation.
      k: as in SAEConfig.k.
      path: to write to.
      metadata: further JSON values, stored as `about` in the file's metadata.

    Raises:
      HeadSteerError: the file cannot be written.
    """
    raw = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), fold_scaling(sae))
    F, D = raw.W_e.shape
    if activation == "batch_topk" and np.ptp(raw.threshold) > 0:
        activation = "jumprelu"  # BatchTopKSAE has one threshold for all latents
    arguments = {"input_shape": D, "nb_concepts": F + 1, "dictionary_params": {"normalization": "identity"}}
    description: dict[str, Any] = {
        "class": OVERCOMPLETE[activation], "arguments": arguments, "constant_concept": F, "about": dict(metadata or {})
    }  # fmt: skip
    tensors = {
        f"{LINEAR}.weight": np.vstack([raw.W_e, np.zeros(D)]),
        f"{LINEAR}.bias": np.append(raw.b_e - raw.W_e @ raw.b_d, CONSTANT_VALUE),
        DICTIONARY: np.vstack([raw.W_d, raw.b_d / CONSTANT_VALUE]),
        "dictionary.multiplier": np.zeros(()),
    }
    if activation != "relu":
        description["k"] = k
    if activation == "topk":
        arguments["top_k"] = min(k, F) + 1
    elif activation == "batch_topk":  # its latents are on at the threshold and above, ours only above it
        description["running_threshold"] = float(np.nextafter(np.float32(raw.threshold[0]), np.float32(np.inf)))
    elif activation == "jumprelu":
        tensors["thresholds"] = np.log(np.maximum(np.append(raw.threshold, 0.0), np.finfo(np.float32).tiny))
    make_directory(path.parent)
    # a single entry: several would be written in random order
    write_bytes(path, to_bytes(tensors, {"overcomplete": json.dumps(description)}))


def import_overcomplete(path: Path, width: int | None = None) -> Imported:
    """Import an SAE of overcomplete with a plain linear encoder, from its state_dict and metadata with its class.

    This writes the metadata:

        metadata = {"class": "TopKSAE", "arguments": {"top_k": 32}}
        safetensors.torch.save_file(sae.state_dict(), path, metadata={"overcomplete": json.dumps(metadata)})

    The arguments are the constructor's; `dictionary_params` is needed if the normalization is not l2, and beside
    `arguments` a BatchTopKSAE's `running_threshold`. The import computes what the module does after `.eval()`. An
    encoder made by `tied` or `untied` is read as well (its tensors must be cloned before they are saved). Encoders are
    assumed to end in ReLU.

    Args:
      path: a .safetensors file.
      width: of the model's residuals, if it is to be checked.

    Raises:
      HeadSteerError: as import_saelens, or the metadata are missing or of a class that is not supported.
    """
    tensors = read_tensors(path)
    m = _read_overcomplete_metadata(path)
    if surplus := sorted(set(tensors) - OVERCOMPLETE_TENSORS):
        archetypal = any(name.startswith(("dictionary.Relax", "dictionary.C")) for name in surplus)
        raise HeadSteerError(
            f"{path}: tensor {surplus[0]!r} does not belong to a plain linear encoder and dictionary"
            f"{' (it is an archetypal SAE)' if archetypal else ''}; choose an SAE "
            "made with encoder_module='linear' and a DictionaryLayer"
        )
    W_d = _read_overcomplete_dictionary(path, tensors, m)
    W_e, b_e = _read_overcomplete_encoder(path, tensors, W_d)
    threshold = _read_overcomplete_threshold(path, tensors, m, len(W_d))
    parameters = Parameters(W_e, b_e, W_d, np.zeros(W_d.shape[1]), threshold, subtracts_b_d=False)
    k = take_integer(path, m["arguments"], "top_k", len(W_d)) if m["activation"] == "topk" else None
    if "constant_concept" in m:  # exported by export_overcomplete
        parameters = _remove_constant_concept(path, parameters, m["constant_concept"])
        k = k - 1 if k else None
    if k is None and "k" in m:
        k = take_integer(path, m, "k")
    # overcomplete itself writes no notes
    provenance = read_metadata(take_object(m, "about"), is_ours="constant_concept" in m)
    return to_autoencoder(path, parameters, m["activation"], k, provenance, width)


def _read_overcomplete_metadata(path: Path) -> dict[str, Any]:
    """Read a file's metadata, with the defaults of `arguments` and `normalization`, and our name of the activation."""
    with safe_open(path, framework="np") as file:
        text = (file.metadata() or {}).get("overcomplete", "{}")
    activations = {name: activation for activation, name in OVERCOMPLETE.items()}
    try:
        m: dict[str, Any] = json.loads(text)
        name, arguments = m.get("class"), m.get("arguments", {})
        normalization = arguments.get("dictionary_params", {}).get("normalization", "l2")
    except (ValueError, AttributeError):
        raise HeadSteerError(
            f"{path}: its metadata are not {{'class': ..., 'arguments': ...}}; save it again"
        ) from None
    if name in list(UNSUPPORTED):
        raise HeadSteerError(
            f"{path}: its metadata say class = {name!r}: {UNSUPPORTED[name]}; it must be one of "
            f"{', '.join(activations)}"
        )
    if name not in list(activations):
        raise HeadSteerError(
            f"{path}: its metadata say class = {name!r}; it must be one of {', '.join(activations)}: save such an SAE "
            """with metadata={'overcomplete': '{"class": "TopKSAE", "arguments": {"top_k": 32}}'}"""
        )
    if normalization not in ("l2", "max_l2", "l1", "max_l1", "identity"):
        raise HeadSteerError(
            f"{path}: its metadata say normalization = {normalization!r}; it must be l2, max_l2, l1, max_l1 or identity"
        )
    return m | {"arguments": arguments, "normalization": normalization, "activation": activations[name]}


def _read_overcomplete_dictionary(path: Path, tensors: Mapping[str, np.ndarray], m: Mapping[str, Any]) -> np.ndarray:
    """Read the dictionary, normalised as overcomplete's sae/dictionary.py does: [F, D]."""
    W_d, normalization = take_tensor(path, tensors, DICTIONARY, (None, None)), m["normalization"]
    if normalization != "identity":
        length_F1 = np.linalg.norm(W_d, ord=int(normalization[-1]), axis=1, keepdims=True)
        W_d = W_d / (length_F1.max() if normalization.startswith("max") else length_F1 + 1e-8)
    return W_d * np.exp(take_tensor(path, tensors, "dictionary.multiplier", ()))


def _read_overcomplete_encoder(
    path: Path, tensors: Mapping[str, np.ndarray], W_d: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Read the encoder's rows [F, D] and biases [F]; a tied encoder's rows are the dictionary's."""
    F = len(W_d)
    tied = "encoder.tied_to._weights" in tensors
    encoder = "encoder" if tied or "encoder.weight" in tensors else LINEAR
    W_e = W_d if tied else take_tensor(path, tensors, f"{encoder}.weight", W_d.shape)
    has_bias = encoder == LINEAR or "encoder.bias" in tensors
    return W_e, take_tensor(path, tensors, f"{encoder}.bias", (F,)) if has_bias else np.zeros(F)


def _read_overcomplete_threshold(
    path: Path, tensors: Mapping[str, np.ndarray], m: Mapping[str, Any], F: int
) -> np.ndarray:
    """Read our thresholds: overcomplete's latents are on at their threshold and above, ours only above it."""
    threshold = np.zeros(F)
    if m["activation"] == "jumprelu":
        threshold = np.exp(take_tensor(path, tensors, "thresholds", (F,)))
    elif m["activation"] == "batch_topk":
        try:
            threshold = threshold + float(m["running_threshold"])
            if not np.isfinite(threshold).all():
                raise ValueError
        except (KeyError, ValueError, TypeError):
            raise HeadSteerError(
                f"{path}: its metadata say running_threshold = {m.get('running_threshold')!r}; save it again with "
                "float(sae.running_threshold) there"
            ) from None
    return np.maximum(np.nextafter(threshold.astype(np.float32), np.float32(-1)), 0)


def _remove_constant_concept(path: Path, parameters: Parameters, concept: Any) -> Parameters:
    """Turn the constant concept of `export_overcomplete`, the last one, into the decoder's bias."""
    W_e, b_e, W_d, _, threshold, _ = parameters
    last = len(W_e) - 1
    if concept != last or W_e[last].any():
        raise HeadSteerError(f"{path}: concept {concept} is not constant; export it again")
    return parameters._replace(
        W_e=W_e[:last], b_e=b_e[:last], W_d=W_d[:last], b_d=b_e[last] * W_d[last], threshold=threshold[:last]
    )
