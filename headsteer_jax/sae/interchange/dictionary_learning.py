"""Import of autoencoders of dictionary_learning: a directory with config.json and ae.pt, or ae.safetensors instead.

Source: dictionary_learning 0.1.0 (dictionary.py, utils.py, trainers/*.py), which produced
tests/goldens/dictionary_learning*. Its training folds a normalisation of the residuals into the weights before it saves
them. Axes: D width, F latents.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from headsteer_jax.errors import HeadSteerError
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
    unit_rows,
)
from headsteer_jax.sae.interchange.provenance import Provenance, of_hook, read_text

LINEAR = {"W_e": "encoder.weight", "b_e": "encoder.bias", "W_d": "decoder.weight"}
PLAIN = {"W_e": "W_enc", "b_e": "b_enc", "W_d": "W_dec", "b_d": "b_dec"}
# our activation of each class, and its tensors by our names
CLASSES: dict[str, tuple[str, dict[str, str]]] = {
    "AutoEncoder": ("relu", LINEAR | {"b_d": "bias"}),
    "AutoEncoderNew": ("relu", LINEAR | {"b_d": "decoder.bias"}),
    "AutoEncoderTopK": ("topk", LINEAR | {"b_d": "b_dec"}),
    "BatchTopKSAE": ("batch_topk", LINEAR | {"b_d": "b_dec", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": ("batch_topk", PLAIN | {"threshold": "threshold"}),
    "JumpReluAutoEncoder": ("jumprelu", PLAIN | {"threshold": "threshold"}),
    "GatedAutoEncoder": (
        "jumprelu",
        {"W_e": "encoder.weight", "W_d": "decoder.weight", "b_d": "decoder_bias", "gate": "gate_bias",
         "b_e": "mag_bias", "log_scale": "r_mag"},
    ),
}  # fmt: skip
UNCENTRED = ("AutoEncoderNew", "JumpReluAutoEncoder")  # they do not subtract the decoder's bias from their input
BUFFERS = {"k", "threshold", "group_sizes"}  # what may be stored beside the parameters


def import_dictionary_learning(directory: Path, width: int | None = None) -> Imported:
    """Import a dictionary of dictionary_learning, as its load_dictionary(directory) and encode(x) compute it.

    The decoder's norms are folded into an AutoEncoder's latents, which load_dictionary does by default. A
    GatedAutoEncoder becomes the JumpReLU that computes the same.

    Args:
      directory: holds config.json and ae.safetensors, or ae.pt, for which torch must be installed.
      width: of the model's residuals, if it is to be checked.

    Raises:
      HeadSteerError: a file is missing or damaged, the class is not supported, a tensor is missing, surplus, misshapen
        or not finite, or the width is another.
    """
    config = directory / "config.json"
    c = read_object(config, "choose a directory of dictionary_learning with config.json and ae.pt or ae.safetensors")
    trainer = take_object(c, "trainer")
    name = trainer.get("dict_class")
    if name not in list(CLASSES):
        raise HeadSteerError(
            f"{config}: trainer.dict_class = {name!r}; it must be {', '.join(CLASSES)}: choose such an autoencoder"
        )
    path = _choose_file(directory)
    tensors = read_tensors(path, (".safetensors", ".pt"))
    parameters = _read_parameters(path, tensors, name)
    activation, k = CLASSES[name][0], None
    if activation in ("topk", "batch_topk"):
        k = _read_k(path, config, trainer, tensors, len(parameters.b_e))
    return to_autoencoder(path, parameters, activation, k, _read_provenance(c), width)


def _choose_file(directory: Path) -> Path:
    """Choose ae.safetensors if it is there, and else ae.pt."""
    path = directory / "ae.safetensors"
    if path.is_file():
        return path
    if (directory / "ae.pt").is_file() and importlib.util.find_spec("torch") is None:
        raise HeadSteerError(
            f"{directory / 'ae.pt'}: a .pt file needs PyTorch: pip install torch, or where you have it, save the "
            "state_dict as ae.safetensors beside it"
        )
    return directory / "ae.pt"


def _read_parameters(path: Path, tensors: Mapping[str, np.ndarray], class_name: str) -> Parameters:
    """Read the parameters of one of CLASSES, as its encode and decode use them."""
    names = CLASSES[class_name][1]
    if surplus := sorted(set(tensors) - set(names.values()) - BUFFERS):
        raise HeadSteerError(f"{path}: the class {class_name} has no tensor {surplus[0]!r}; choose another")
    linear = names["W_e"] == "encoder.weight"  # matrices are those of nn.Linear: [outputs, inputs]
    W_e = take_tensor(path, tensors, names["W_e"], (None, None))
    F, D = W_e.shape if linear else W_e.shape[::-1]
    W_d = take_tensor(path, tensors, names["W_d"], (D, F) if linear else (F, D))
    W_e, W_d = (W_e, W_d.T) if linear else (W_e.T, W_d)
    b_e, b_d = take_tensor(path, tensors, names["b_e"], (F,)), take_tensor(path, tensors, names["b_d"], (D,))
    threshold = np.zeros(F)
    if class_name == "GatedAutoEncoder":
        gate, log_scale = (take_tensor(path, tensors, names[key], (F,)) for key in ("gate", "log_scale"))
        W_e, b_e, threshold = fold_gate(W_e, gate, b_e, log_scale)
    elif "threshold" in names:
        batch_topk = CLASSES[class_name][0] == "batch_topk"
        threshold = threshold + take_tensor(path, tensors, "threshold", () if batch_topk else (F,))
        if batch_topk and threshold[0] < 0:
            raise HeadSteerError(
                f"{path}: threshold = {threshold[0]:g}: it was never set, because the training ended before "
                "threshold_start_step; train longer, or choose another"
            )
    parameters = Parameters(W_e, b_e, W_d, b_d, threshold, class_name not in UNCENTRED)
    return unit_rows(parameters) if class_name == "AutoEncoder" else parameters


def _read_k(
    path: Path, config: Path, trainer: Mapping[str, Any], tensors: Mapping[str, np.ndarray], latents: int
) -> int:
    """Read k, which config.json has and, since 2024, the weights as well: they must agree, as load_dictionary says."""
    k = take_integer(config, trainer, "k", latents)
    if "k" in tensors and tensors["k"] != k:
        raise HeadSteerError(f"{path}: k = {tensors['k']:g}, but {config} has {k}; take both from one training")
    return k


def _read_provenance(c: Mapping[str, Any]) -> Provenance:
    """Read the place from the trainer's notes, and if these do not name it, from the activation buffer's."""
    trainer, buffer = take_object(c, "trainer"), take_object(c, "buffer")
    hook, layer = read_text(trainer, "submodule_name"), trainer.get("layer")
    if hook and type(layer) is int and not any(map(str.isdigit, hook)):
        hook = f"{hook}_layer_{layer}"
    provenance = of_hook(hook, layer)
    return provenance._replace(model=read_text(trainer, "lm_name"), dataset=read_text(buffer, "dataset"))
