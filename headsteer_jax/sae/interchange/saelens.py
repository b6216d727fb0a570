"""Export and import of autoencoders in SAELens' files: a directory with cfg.json and sae_weights.safetensors.

An export reads residuals as they are in the model: centre and scale are folded into its weights (`fold_scaling`), so
its latents are ours divided by the scale, and it reconstructs x, not u.

Source: sae_lens 6.54.12 (saes/*.py, loading/pretrained_sae_loaders.py), which produced tests/goldens/saelens*.
Axes: D width, F latents.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime.files import make_directory, write_bytes, write_json
from headsteer_jax.sae.autoencoder import Autoencoder, fold_scaling
from headsteer_jax.sae.interchange.files import (
    Imported,
    Parameters,
    fold_gate,
    read_object,
    read_tensors,
    take_integer,
    take_object,
    take_tensor,
    to_autoencoder,
    to_bytes,
    unit_rows,
)
from headsteer_jax.sae.interchange.provenance import read_metadata

SAELENS_LAYOUT = "6.54.12"  # of sae_lens; a config without a version is read as one from before 6.0
# our activation: SAELens' architecture in files, its architecture in training, and its name for k in training
SAELENS = {
    "relu": ("standard", "standard", ""),
    "topk": ("topk", "topk", "k"),
    "batch_topk": ("jumprelu", "batchtopk", "k"),  # stored for inference as JumpReLU with one threshold
    "jumprelu": ("jumprelu", "jumprelu", "target_l0"),
}
# what other architectures are, for the error message
UNSUPPORTED = {
    "transcoder": "a transcoder, which predicts one place of a model from another",
    "skip_transcoder": "a transcoder with a skip connection, which predicts one place of a model from another",
    "jumprelu_transcoder": "a transcoder, which predicts one place of a model from another",
    "jumprelu_skip_transcoder": "a transcoder with a skip connection, which predicts one place of a model from another",
    "matching_pursuit": "an autoencoder whose encoder is a matching pursuit, not one linear layer",
    "abstopk": "an autoencoder whose latents may be negative",
    "temporal": "an autoencoder of sequences of tokens",
}
BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")  # only training checkpoints have these architectures


def export_saelens(
    sae: Autoencoder, activation: str, k: int, directory: Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write cfg.json and sae_weights.safetensors, as `sae_lens.SAE.load_from_disk(directory)` reads them.

    Args:
      sae: one autoencoder (`Autoencoder.member`).
      activation: as in SAEConfig.activation.
      k: as in SAEConfig.k.
      directory: to write to.
      metadata: further JSON values for SAELens' metadata, such as `model_name` and `hook_name`.

    Raises:
      HeadSteerError: the directory cannot be written.
    """
    raw = jax.tree.map(np.asarray, fold_scaling(sae))
    F, D = raw.W_e.shape
    architecture, training_architecture, k_name = SAELENS[activation]
    config: dict[str, Any] = {
        "architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_LAYOUT, "sae_lens_training_version": None,
            "training_architecture": training_architecture,
            "training_architecture_details": {k_name: k} if k_name else {}, **(metadata or {}),
        },
    }  # fmt: skip
    tensors = {"W_enc": raw.W_e.T, "b_enc": raw.b_e, "W_dec": raw.W_d, "b_dec": raw.b_d}
    if activation == "topk":
        config |= {"k": min(k, F), "rescale_acts_by_decoder_norm": False}
    if architecture == "jumprelu":
        tensors["threshold"] = raw.threshold
    make_directory(directory)
    write_bytes(directory / "sae_weights.safetensors", to_bytes(tensors, {"format": "pt"}))
    write_json(directory / "cfg.json", config)


def import_saelens(directory: Path, width: int | None = None) -> Imported:
    """Import an SAE of SAELens: standard, gated, topk, jumprelu, or a training checkpoint of (matryoshka_)batchtopk.

    Configs from before 6.0 are understood. A decoder norm in the activations (rescale_acts_by_decoder_norm) is folded
    into the encoder, as is an input from which b_dec is not subtracted. A gated SAE becomes the JumpReLU that computes
    the same. Weights of any dtype become float32.

    Args:
      directory: holds cfg.json and sae_weights.safetensors.
      width: of the model's residuals, if it is to be checked.

    Raises:
      HeadSteerError: a file is missing or damaged, the architecture or another setting is not supported, a tensor is
        missing, surplus, misshapen or not finite, or the width is another.
    """
    path = directory / "sae_weights.safetensors"
    c = _read_saelens_config(directory / "cfg.json")
    parameters = _read_saelens_parameters(path, c)
    activation, k = _read_saelens_activation(directory / "cfg.json", c, parameters)
    metadata = c | take_object(c, "metadata")
    provenance = read_metadata(
        metadata, is_ours={"seed", "tokens"} <= metadata.keys()
    )  # as deploy/export.py writes them
    return to_autoencoder(path, parameters, activation, k, provenance, width)


def _read_saelens_config(path: Path) -> dict[str, Any]:
    """Read cfg.json, refuse settings that are not supported, and fill in defaults as SAELens does."""
    c = read_object(path, "choose a directory of SAELens with cfg.json and sae_weights.safetensors")
    architecture = c.get("architecture", "standard")
    activation_fn = c.get("activation_fn", c.get("activation_fn_str", "relu"))  # before 6.0
    if activation_fn == "topk":
        architecture, c = "topk", {**c, "k": take_object(c, "activation_fn_kwargs").get("k")}
    hook = str(c.get("hook_name", c.get("hook_point", "")))
    settings = {
        "architecture": (architecture, ("standard", "gated", "topk", "jumprelu", *BATCH_TOPK)),
        "activation_fn": (activation_fn, ("relu", "topk")),
        "normalize_activations": (c.get("normalize_activations") or "none", ("none",)),
        "reshape_activations": (c.get("reshape_activations", "hook_z" if "hook_z" in hook else "none"), ("none",)),
        "apply_b_dec_to_input": (c.get("apply_b_dec_to_input", True), (True, False)),
        "rescale_acts_by_decoder_norm": (
            c.get("rescale_acts_by_decoder_norm", architecture in BATCH_TOPK), (True, False)
        ),
        "finetuning_scaling_factor": (bool(c.get("finetuning_scaling_factor")), (False,)),
    }  # fmt: skip
    for name, (value, allowed) in settings.items():
        if value not in allowed:
            description = f"{UNSUPPORTED[value]}; " if name == "architecture" and value in list(UNSUPPORTED) else ""
            raise HeadSteerError(
                f"{path}: {name} = {value!r}; {description}it must be {', '.join(map(str, allowed))}: choose such an "
                "SAE" + (", or fold the normalisation in SAELens and save it again" if name.startswith("norm") else "")
            )
    if c.get("d_out", c.get("d_in")) != c.get("d_in") or take_object(c, "metadata").get("hook_name_out"):
        raise HeadSteerError(
            f"{path}: it has an output of its own (d_out, hook_name_out): {UNSUPPORTED['transcoder']}; choose an SAE"
        )
    sizes = {name: take_integer(path, c, name) for name in ("d_in", "d_sae")}
    return c | {name: value for name, (value, _) in settings.items()} | sizes


def _read_saelens_parameters(path: Path, c: Mapping[str, Any]) -> Parameters:
    """Read the weights that belong to a config; the decoder's norm is folded into the encoder."""
    D, F, architecture = c["d_in"], c["d_sae"], c["architecture"]
    tensors = read_tensors(path)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    if architecture == "jumprelu":
        shapes["threshold"] = (F,)
    elif architecture == "gated":
        del shapes["b_enc"]
        shapes |= {"b_gate": (F,), "b_mag": (F,), "r_mag": (F,)}
    elif architecture in BATCH_TOPK:
        shapes["topk_threshold"] = ()
    if np.all(tensors.get("scaling_factor", 0) == 1):
        del tensors["scaling_factor"]  # SAELens wrote it for a while and ignores it when reading
    if surplus := sorted(set(tensors) - set(shapes)):
        raise HeadSteerError(f"{path}: a {architecture} SAE has no place for the tensor {surplus[0]!r}; choose another")
    read = {name: take_tensor(path, tensors, name, shape) for name, shape in shapes.items()}
    W_e, b_e, threshold = read["W_enc"].T, read.get("b_enc", np.zeros(F)), np.zeros(F)
    if architecture == "gated":
        W_e, b_e, threshold = fold_gate(W_e, read["b_gate"], read["b_mag"], read["r_mag"])
    threshold = threshold + read.get("threshold", read.get("topk_threshold", 0.0))
    parameters = Parameters(W_e, b_e, read["W_dec"], read["b_dec"], threshold, c["apply_b_dec_to_input"])
    rescaled = c["rescale_acts_by_decoder_norm"] and architecture in ("topk", *BATCH_TOPK)
    return unit_rows(parameters) if rescaled else parameters


def _read_saelens_activation(path: Path, c: Mapping[str, Any], parameters: Parameters) -> tuple[str, int | None]:
    """Read our activation and k from SAELens' config, and for BatchTopK from its notes on training."""
    metadata = take_object(c, "metadata")
    details = take_object(metadata, "training_architecture_details")
    if c["architecture"] == "topk":
        return "topk", take_integer(path, c, "k", c["d_sae"])
    activation = "relu" if c["architecture"] == "standard" else "jumprelu"
    is_batch_topk = c["architecture"] in BATCH_TOPK or metadata.get("training_architecture") in BATCH_TOPK
    if is_batch_topk and np.ptp(parameters.threshold) == 0:
        activation = "batch_topk"
    k = c.get("k", details.get("k", details.get("target_l0")))  # only a note on training
    return activation, round(k) if isinstance(k, int | float) and 1 <= k <= c["d_sae"] else None
