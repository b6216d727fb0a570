"""Autoencoders in the files of other libraries, out and in: SAELens' directories and overcomplete's state_dicts.

An export reads residuals as they are in the model: centring and scale are folded into its weights (`fold_scaling`), so
its latents are ours divided by the scale and it reconstructs x, not u. An import reads them so as well: its scaling is
mean 0 and scale 1. Everything that changes what a file computes is carried over or refused; arithmetic is in float64.

Sources: sae_lens 6.54.12 (saes/*.py, loading/pretrained_sae_loaders.py) and overcomplete 0.3.0 (sae/*.py), which made
tests/goldens/saelens* and overcomplete*. Axes: D width, F latents.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model import weights
from headsteer_jax.runtime.files import make_directory, write_bytes, write_json
from headsteer_jax.sae.autoencoder import Autoencoder, SAEWeights, Scaling, fold_scaling

SAELENS_LAYOUT = "6.54.12"  # of sae_lens; a config that names none is read as one from before 6.0
# our activation: SAELens' architecture in files, in training, and what training calls k there
SAELENS = {
    "relu": ("standard", "standard", ""),
    "topk": ("topk", "topk", "k"),
    "batch_topk": ("jumprelu", "batchtopk", "k"),  # stored for inference as JumpReLU with one threshold
    "jumprelu": ("jumprelu", "jumprelu", "target_l0"),
}
BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")  # only a checkpoint of training has these architectures

OVERCOMPLETE = {"relu": "SAE", "topk": "TopKSAE", "batch_topk": "BatchTopKSAE", "jumprelu": "JumpSAE"}
LINEAR, DICTIONARY = "encoder.final_block.0", "dictionary._weights"
OVERCOMPLETE_TENSORS = {
    f"{LINEAR}.weight", f"{LINEAR}.bias", "encoder.weight", "encoder.bias", "encoder.tied_to._weights",
    "encoder.tied_to.multiplier", DICTIONARY, "dictionary.multiplier", "thresholds",
}  # fmt: skip
CONSTANT_VALUE = 2.0**20  # the constant concept's value: above any latent, and a power of two, which rounds nothing


class Imported(NamedTuple):
    """An autoencoder from elsewhere, of residuals as they are."""

    sae: Autoencoder  # its scaling is mean 0, scale 1
    activation: str  # as in SAEConfig.activation
    k: int | None  # as in SAEConfig.k; None: the file does not say


def export_saelens(
    sae: Autoencoder, kind: str, k: int, directory: Path, about: Mapping[str, Any] | None = None
) -> None:
    """Write cfg.json and sae_weights.safetensors, as `sae_lens.SAE.load_from_disk(directory)` reads them.

    Args:
      sae: one autoencoder (`Autoencoder.member`).
      kind: SAEConfig.activation.
      about: JSON values for SAELens' metadata: `model_name`, `hook_name`, whatever helps.

    Raises:
      HeadSteerError: the directory cannot be written.
    """
    raw = jax.tree.map(np.asarray, fold_scaling(sae))
    F, D = raw.W_e.shape
    architecture, trained, name = SAELENS[kind]
    config: dict[str, Any] = {
        "architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_LAYOUT, "sae_lens_training_version": None, "training_architecture": trained,
            "training_architecture_details": {name: k} if name else {}, **(about or {}),
        },
    }  # fmt: skip
    tensors = {"W_enc": raw.W_e.T, "b_enc": raw.b_e, "W_dec": raw.W_d, "b_dec": raw.b_d}
    if kind == "topk":
        config |= {"k": min(k, F), "rescale_acts_by_decoder_norm": False}
    if architecture == "jumprelu":
        tensors["threshold"] = raw.threshold
    make_directory(directory)
    write_bytes(directory / "sae_weights.safetensors", _to_bytes(tensors, {"format": "pt"}))
    write_json(directory / "cfg.json", config)


def import_saelens(directory: Path, width: int | None = None) -> Imported:
    """An SAE of SAELens: standard, topk, jumprelu, or a checkpoint of training batchtopk or matryoshka_batchtopk.

    Configs from before 6.0 are understood. A decoder norm in the activations (rescale_acts_by_decoder_norm) is folded
    into the encoder, as is an input from which b_dec is not subtracted. Weights become float32, whatever they were.

    Args:
      directory: holds cfg.json and sae_weights.safetensors.
      width: of the model's residuals, if it is to be checked.

    Raises:
      HeadSteerError: a file is missing or damaged, the architecture or another setting is not supported, a tensor is
        missing, surplus, misshapen or not finite, or the width is another.
    """
    config = directory / "cfg.json"
    try:
        c = json.loads(config.read_text())
    except OSError:
        raise HeadSteerError(
            f"{config}: no such file; choose a directory with cfg.json and sae_weights.safetensors"
        ) from None
    except ValueError as error:
        raise HeadSteerError(f"{config}: damaged ({error}); download it again") from None
    if not isinstance(c, dict):
        raise HeadSteerError(f"{config}: it holds no JSON object; choose a directory that SAELens saved")

    architecture = c.get("architecture", "standard")
    activation_fn = c.get("activation_fn", c.get("activation_fn_str", "relu"))  # before 6.0
    if activation_fn == "topk":
        architecture, c = "topk", {**c, "k": _read_object(c, "activation_fn_kwargs").get("k")}
    hook = str(c.get("hook_name", c.get("hook_point", "")))
    settings = {
        "architecture": (architecture, ("standard", "topk", "jumprelu", *BATCH_TOPK)),
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
            raise HeadSteerError(
                f"{config}: {name} = {value!r}; allowed is {', '.join(map(str, allowed))}: choose such an SAE"
                + (", or fold the normalisation in SAELens and save it again" if name.startswith("norm") else "")
            )

    D, F = (_read_integer(config, c, name) for name in ("d_in", "d_sae"))
    path = config.with_name("sae_weights.safetensors")
    tensors = _read_file(path)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    if architecture == "jumprelu":
        shapes["threshold"] = (F,)
    elif architecture in BATCH_TOPK:
        shapes["topk_threshold"] = ()
    if np.all(tensors.get("scaling_factor", 0) == 1):
        del tensors["scaling_factor"]  # SAELens wrote it for a while, and reads it as nothing
    if surplus := sorted(set(tensors) - set(shapes)):
        raise HeadSteerError(f"{path}: a {architecture} SAE has no place for the tensor {surplus[0]!r}; choose another")
    W_DF, b_e, W_d, b_d, *thresholds = (_read_tensor(path, tensors, name, shape) for name, shape in shapes.items())
    W_e, threshold = W_DF.T, sum(thresholds, np.zeros(F))
    if settings["rescale_acts_by_decoder_norm"][0] and architecture in ("topk", *BATCH_TOPK):
        length_F = np.linalg.norm(W_d, axis=1)
        W_e, b_e = W_e * length_F[:, None], b_e * length_F
        W_d = W_d / np.where(length_F > 0, length_F, 1.0)[:, None]

    metadata = _read_object(c, "metadata")
    details = _read_object(metadata, "training_architecture_details")
    activation = {"standard": "relu", "topk": "topk"}.get(architecture, "jumprelu")
    k = c.get("k", details.get("k", details.get("target_l0")))
    if (architecture in BATCH_TOPK or metadata.get("training_architecture") in BATCH_TOPK) and np.ptp(threshold) == 0:
        activation = "batch_topk"
    if activation == "topk":
        k = _read_integer(config, c, "k", F)
    else:  # only a note of how it was trained
        k = round(k) if isinstance(k, int | float) and 1 <= k <= F else None
    subtracts = settings["apply_b_dec_to_input"][0]
    return _to_imported(path, (W_e, b_e, W_d, b_d, threshold), subtracts, activation, k, width)


def export_overcomplete(
    sae: Autoencoder, kind: str, k: int, path: Path, about: Mapping[str, Any] | None = None
) -> None:
    """Write the state_dict of overcomplete's TopKSAE, BatchTopKSAE, JumpSAE or (relu) SAE; metadata say which:

        about = json.loads(safetensors.safe_open(path, "pt").metadata()["overcomplete"])
        sae = getattr(overcomplete.sae, about["class"])(**about["arguments"])
        sae.load_state_dict(safetensors.torch.load_file(path))
        sae.running_threshold = about.get("running_threshold")  # BatchTopKSAE's, which is not in its state_dict
        sae.eval()  # last: what is loaded after it is not used

    Overcomplete's decoders have no bias. Ours, which holds the training mean, is therefore one more concept, the last:
    always on, its value CONSTANT, its dictionary row b_d / CONSTANT. `sae.encode(x)[1][:, :-1]` are our latents, and
    `sae(x)[2]` is our reconstruction.

    Args, Raises: as export_saelens; `about` goes into the metadata.
    """
    raw = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), fold_scaling(sae))
    F, D = raw.W_e.shape
    if kind == "batch_topk" and np.ptp(raw.threshold) > 0:
        kind = "jumprelu"  # BatchTopKSAE has one threshold for all
    arguments = {"input_shape": D, "nb_concepts": F + 1, "dictionary_params": {"normalization": "identity"}}
    metadata: dict[str, Any] = {
        "class": OVERCOMPLETE[kind], "arguments": arguments, "constant_concept": F, "about": dict(about or {})
    }  # fmt: skip
    tensors = {
        f"{LINEAR}.weight": np.vstack([raw.W_e, np.zeros(D)]),
        f"{LINEAR}.bias": np.append(raw.b_e - raw.W_e @ raw.b_d, CONSTANT_VALUE),
        DICTIONARY: np.vstack([raw.W_d, raw.b_d / CONSTANT_VALUE]),
        "dictionary.multiplier": np.zeros(()),
    }
    if kind != "relu":
        metadata["k"] = k
    if kind == "topk":
        arguments["top_k"] = min(k, F) + 1
    elif kind == "batch_topk":  # there a latent is on from the threshold on, here above it
        metadata["running_threshold"] = float(np.nextafter(np.float32(raw.threshold[0]), np.float32(np.inf)))
    elif kind == "jumprelu":
        tensors["thresholds"] = np.log(np.maximum(np.append(raw.threshold, 0.0), np.finfo(np.float32).tiny))
    make_directory(path.parent)
    write_bytes(path, _to_bytes(tensors, {"overcomplete": json.dumps(metadata)}))  # one: several come in random order


def import_overcomplete(path: Path, width: int | None = None) -> Imported:
    """An SAE of overcomplete with a plain linear encoder, from its state_dict and metadata that say its class:

        about = {"class": "TopKSAE", "arguments": {"top_k": 32}}
        safetensors.torch.save_file(sae.state_dict(), path, metadata={"overcomplete": json.dumps(about)})

    The arguments are the constructor's; `dictionary_params` is needed where the normalization is not l2, and beside
    them a BatchTopKSAE's `running_threshold`. Read is what the module computes after `.eval()`. An encoder made by
    `tied` or `untied` is read as well (its tensors cloned before saving). That encoders end in ReLU is assumed.

    Raises:
      HeadSteerError: as import_saelens, or the metadata are missing or of a class that is not supported.
    """
    tensors = _read_file(path)
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
    if name not in list(activations):
        raise HeadSteerError(
            f"{path}: its metadata say class = {name!r}; allowed is {', '.join(activations)}: save such an SAE with "
            """metadata={'overcomplete': '{"class": "TopKSAE", "arguments": {"top_k": 32}}'}"""
        )
    if surplus := sorted(set(tensors) - OVERCOMPLETE_TENSORS):
        raise HeadSteerError(
            f"{path}: tensor {surplus[0]!r} is not of a plain linear encoder and dictionary; choose an SAE made with "
            "encoder_module='linear' and a DictionaryLayer"
        )
    if normalization not in ("l2", "max_l2", "l1", "max_l1", "identity"):
        raise HeadSteerError(
            f"{path}: its metadata say normalization = {normalization!r}; allowed is l2, max_l2, l1, max_l1, identity"
        )

    W_d = _read_tensor(path, tensors, DICTIONARY, (None, None))
    F, D = W_d.shape
    if normalization != "identity":  # sae/dictionary.py
        length_F1 = np.linalg.norm(W_d, ord=int(normalization[-1]), axis=1, keepdims=True)
        W_d = W_d / (length_F1.max() if normalization.startswith("max") else length_F1 + 1e-8)
    W_d = W_d * np.exp(_read_tensor(path, tensors, "dictionary.multiplier", ()))
    tied = "encoder.tied_to._weights" in tensors
    encoder = "encoder" if tied or "encoder.weight" in tensors else LINEAR
    W_e = W_d if tied else _read_tensor(path, tensors, f"{encoder}.weight", (F, D))
    has_bias = encoder == LINEAR or "encoder.bias" in tensors
    b_e = _read_tensor(path, tensors, f"{encoder}.bias", (F,)) if has_bias else np.zeros(F)

    activation, k, threshold = activations[name], None, np.zeros(F)
    if activation == "topk":
        k = _read_integer(path, arguments, "top_k", F)
    elif activation == "jumprelu":
        threshold = np.exp(_read_tensor(path, tensors, "thresholds", (F,)))
    elif activation == "batch_topk":
        try:
            threshold = threshold + float(m["running_threshold"])
            if not np.isfinite(threshold).all():
                raise ValueError
        except (KeyError, ValueError, TypeError):
            raise HeadSteerError(
                f"{path}: its metadata say running_threshold = {m.get('running_threshold')!r}; save it again with "
                "float(sae.running_threshold) there"
            ) from None
    # there a latent is on from the threshold on, here above it
    threshold = np.maximum(np.nextafter(threshold.astype(np.float32), np.float32(-1)), 0)
    b_d = np.zeros(D)
    if "constant_concept" in m:  # ours: export_overcomplete
        last = F - 1
        if m["constant_concept"] != last or W_e[last].any():
            raise HeadSteerError(f"{path}: concept {m['constant_concept']} is not constant; export it again")
        b_d = b_e[last] * W_d[last]
        W_e, b_e, W_d, threshold = W_e[:last], b_e[:last], W_d[:last], threshold[:last]
        k = k - 1 if k else None
    if k is None and "k" in m:
        k = _read_integer(path, m, "k")
    return _to_imported(path, (W_e, b_e, W_d, b_d, threshold), False, activation, k, width)


def _to_bytes(tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    return save({name: np.asarray(value, np.float32, order="C") for name, value in tensors.items()}, metadata)


def _read_file(path: Path) -> dict[str, np.ndarray]:
    """A .safetensors file's tensors, float32 and finite."""
    if not path.is_file() or path.suffix != ".safetensors":
        raise HeadSteerError(f"{path}: no such .safetensors file; choose an SAE's file that is there")
    return weights.read_tensors(path)


def _read_tensor(path: Path, tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """A tensor of this shape, where None is any length, in float64."""
    if name not in tensors:
        raise HeadSteerError(f"{path}: there is no tensor {name!r}, which an SAE of this kind has; save it again")
    found = tensors[name].shape
    if len(found) != len(shape) or any(b not in (a, None) for a, b in zip(found, shape, strict=True)):
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise HeadSteerError(
            f"{path}: tensor {name!r} has the shape {list(found)}, not [{wanted}] as the rest of it says; save it again"
        )
    return tensors[name].astype(np.float64)


def _read_object(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = values.get(name)
    return value if isinstance(value, dict) else {}


def _read_integer(path: Path, values: Mapping[str, Any], name: str, most: int | None = None) -> int:
    value = values.get(name)
    if type(value) is not int or not 1 <= value <= (most or value):
        allowed = f"1 to {most}" if most else "1 and more"
        raise HeadSteerError(f"{path}: {name} = {value!r}; allowed are whole numbers, {allowed}: save it again")
    return value


def _to_imported(
    path: Path, parameters: Sequence[np.ndarray], subtracts: bool, activation: str, k: int | None, width: int | None
) -> Imported:
    """From a SAE's parameters, in order. `subtracts`: the other one takes b_d from its input first, as ours does."""
    W_e, b_e, W_d, b_d, threshold = parameters
    D = len(b_d)
    if width not in (None, D):
        raise HeadSteerError(f"{path}: it reads residuals of width {D}, the model's are {width} wide; choose another")
    b_e = b_e if subtracts else b_e + W_e @ b_d
    weights = SAEWeights(*(jnp.asarray(value, jnp.float32) for value in (W_e, b_e, W_d, b_d, threshold)))
    scaling = Scaling(np.zeros(D, np.float32), np.asarray(1.0, np.float32))
    return Imported(Autoencoder(weights, scaling, k if activation == "topk" else None), activation, k)
