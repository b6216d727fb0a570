"""Export and import of autoencoders in the files of other libraries: SAELens and overcomplete.

An export reads residuals as they are in the model: centre and scale are folded into its weights (`fold_scaling`), so
its latents are ours divided by the scale, and it reconstructs x, not u. An import does the same: its scaling is mean 0
and scale 1. Every setting that changes the result of a file is carried over or refused; arithmetic is in float64.

Sources: sae_lens 6.54.12 (saes/*.py, loading/pretrained_sae_loaders.py) and overcomplete 0.3.0 (sae/*.py), which
produced tests/goldens/saelens* and overcomplete*. Axes: D width, F latents.
"""

import json
from collections.abc import Mapping
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

SAELENS_LAYOUT = "6.54.12"  # of sae_lens; a config without a version is read as one from before 6.0
# our activation: SAELens' architecture in files, its architecture in training, and its name for k in training
SAELENS = {
    "relu": ("standard", "standard", ""),
    "topk": ("topk", "topk", "k"),
    "batch_topk": ("jumprelu", "batchtopk", "k"),  # stored for inference as JumpReLU with one threshold
    "jumprelu": ("jumprelu", "jumprelu", "target_l0"),
}
BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")  # only training checkpoints have these architectures

OVERCOMPLETE = {"relu": "SAE", "topk": "TopKSAE", "batch_topk": "BatchTopKSAE", "jumprelu": "JumpSAE"}
LINEAR, DICTIONARY = "encoder.final_block.0", "dictionary._weights"
OVERCOMPLETE_TENSORS = {
    f"{LINEAR}.weight", f"{LINEAR}.bias", "encoder.weight", "encoder.bias", "encoder.tied_to._weights",
    "encoder.tied_to.multiplier", DICTIONARY, "dictionary.multiplier", "thresholds",
}  # fmt: skip
CONSTANT_VALUE = 2.0**20  # of the constant concept: above any latent, and a power of two, so that nothing is rounded


class Imported(NamedTuple):
    """An autoencoder of another library, which reads residuals as they are in the model."""

    sae: Autoencoder  # its scaling is mean 0, scale 1
    activation: str  # as in SAEConfig.activation
    k: int | None  # as in SAEConfig.k; None: the file does not tell


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
    write_bytes(directory / "sae_weights.safetensors", _to_bytes(tensors, {"format": "pt"}))
    write_json(directory / "cfg.json", config)


class _Parameters(NamedTuple):
    """The parameters of an autoencoder in another library's file, in float64."""

    W_e: np.ndarray  # [F, D]
    b_e: np.ndarray
    W_d: np.ndarray  # [F, D]
    b_d: np.ndarray
    threshold: np.ndarray  # [F]
    subtracts_b_d: bool  # from the encoder's input, as ours does


def import_saelens(directory: Path, width: int | None = None) -> Imported:
    """Import an SAE of SAELens: standard, topk, jumprelu, or a training checkpoint of (matryoshka_)batchtopk.

    Configs from before 6.0 are understood. A decoder norm in the activations (rescale_acts_by_decoder_norm) is folded
    into the encoder, as is an input from which b_dec is not subtracted. Weights of any dtype become float32.

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
    return _to_imported(path, parameters, activation, k, width)


def _read_saelens_config(path: Path) -> dict[str, Any]:
    """Read cfg.json, refuse settings that are not supported, and fill in defaults as SAELens does."""
    try:
        c = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise HeadSteerError(
            f"{path}: no such file; choose a directory with cfg.json and sae_weights.safetensors"
        ) from None
    except ValueError as error:
        raise HeadSteerError(f"{path}: damaged ({error}); download it again") from None
    if not isinstance(c, dict):
        raise HeadSteerError(f"{path}: it holds no JSON object; choose a directory that SAELens saved")

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
                f"{path}: {name} = {value!r}; it must be {', '.join(map(str, allowed))}: choose such an SAE"
                + (", or fold the normalisation in SAELens and save it again" if name.startswith("norm") else "")
            )
    sizes = {name: _read_integer(path, c, name) for name in ("d_in", "d_sae")}
    return c | {name: value for name, (value, _) in settings.items()} | sizes


def _read_saelens_parameters(path: Path, c: Mapping[str, Any]) -> _Parameters:
    """Read the weights that belong to a config; the decoder's norm is folded into the encoder."""
    D, F, architecture = c["d_in"], c["d_sae"], c["architecture"]
    tensors = _read_file(path)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    if architecture == "jumprelu":
        shapes["threshold"] = (F,)
    elif architecture in BATCH_TOPK:
        shapes["topk_threshold"] = ()
    if np.all(tensors.get("scaling_factor", 0) == 1):
        del tensors["scaling_factor"]  # SAELens wrote it for a while and ignores it when reading
    if surplus := sorted(set(tensors) - set(shapes)):
        raise HeadSteerError(f"{path}: a {architecture} SAE has no place for the tensor {surplus[0]!r}; choose another")
    W_DF, b_e, W_d, b_d, *thresholds = (_read_tensor(path, tensors, name, shape) for name, shape in shapes.items())
    W_e, threshold = W_DF.T, sum(thresholds, np.zeros(F))
    if c["rescale_acts_by_decoder_norm"] and architecture in ("topk", *BATCH_TOPK):
        length_F = np.linalg.norm(W_d, axis=1)
        W_e, b_e = W_e * length_F[:, None], b_e * length_F
        W_d = W_d / np.where(length_F > 0, length_F, 1.0)[:, None]
    return _Parameters(W_e, b_e, W_d, b_d, threshold, c["apply_b_dec_to_input"])


def _read_saelens_activation(path: Path, c: Mapping[str, Any], parameters: _Parameters) -> tuple[str, int | None]:
    """Read our activation and k from SAELens' config, and for BatchTopK from its notes on training."""
    metadata = _read_object(c, "metadata")
    details = _read_object(metadata, "training_architecture_details")
    if c["architecture"] == "topk":
        return "topk", _read_integer(path, c, "k", c["d_sae"])
    activation = "relu" if c["architecture"] == "standard" else "jumprelu"
    is_batch_topk = c["architecture"] in BATCH_TOPK or metadata.get("training_architecture") in BATCH_TOPK
    if is_batch_topk and np.ptp(parameters.threshold) == 0:
        activation = "batch_topk"
    k = c.get("k", details.get("k", details.get("target_l0")))  # only a note on training
    return activation, round(k) if isinstance(k, int | float) and 1 <= k <= c["d_sae"] else None


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
    write_bytes(path, _to_bytes(tensors, {"overcomplete": json.dumps(description)}))


def import_overcomplete(path: Path, width: int | None = None) -> Imported:
    """Import an SAE of overcomplete with a plain linear encoder, from its state_dict and metadata with its class.

    The metadata come from

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
    tensors = _read_file(path)
    m = _read_overcomplete_metadata(path)
    if surplus := sorted(set(tensors) - OVERCOMPLETE_TENSORS):
        raise HeadSteerError(
            f"{path}: tensor {surplus[0]!r} does not belong to a plain linear encoder and dictionary; choose an SAE "
            "made with encoder_module='linear' and a DictionaryLayer"
        )
    W_d = _read_overcomplete_dictionary(path, tensors, m)
    W_e, b_e = _read_overcomplete_encoder(path, tensors, W_d)
    threshold = _read_overcomplete_threshold(path, tensors, m, len(W_d))
    parameters = _Parameters(W_e, b_e, W_d, np.zeros(W_d.shape[1]), threshold, subtracts_b_d=False)
    k = _read_integer(path, m["arguments"], "top_k", len(W_d)) if m["activation"] == "topk" else None
    if "constant_concept" in m:  # exported by export_overcomplete
        parameters = _remove_constant_concept(path, parameters, m["constant_concept"])
        k = k - 1 if k else None
    if k is None and "k" in m:
        k = _read_integer(path, m, "k")
    return _to_imported(path, parameters, m["activation"], k, width)


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
    W_d, normalization = _read_tensor(path, tensors, DICTIONARY, (None, None)), m["normalization"]
    if normalization != "identity":
        length_F1 = np.linalg.norm(W_d, ord=int(normalization[-1]), axis=1, keepdims=True)
        W_d = W_d / (length_F1.max() if normalization.startswith("max") else length_F1 + 1e-8)
    return W_d * np.exp(_read_tensor(path, tensors, "dictionary.multiplier", ()))


def _read_overcomplete_encoder(
    path: Path, tensors: Mapping[str, np.ndarray], W_d: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Read the encoder's rows [F, D] and biases [F]; a tied encoder's rows are the dictionary's."""
    F = len(W_d)
    tied = "encoder.tied_to._weights" in tensors
    encoder = "encoder" if tied or "encoder.weight" in tensors else LINEAR
    W_e = W_d if tied else _read_tensor(path, tensors, f"{encoder}.weight", W_d.shape)
    has_bias = encoder == LINEAR or "encoder.bias" in tensors
    return W_e, _read_tensor(path, tensors, f"{encoder}.bias", (F,)) if has_bias else np.zeros(F)


def _read_overcomplete_threshold(
    path: Path, tensors: Mapping[str, np.ndarray], m: Mapping[str, Any], F: int
) -> np.ndarray:
    """Read our thresholds: overcomplete's latents are on at their threshold and above, ours only above it."""
    threshold = np.zeros(F)
    if m["activation"] == "jumprelu":
        threshold = np.exp(_read_tensor(path, tensors, "thresholds", (F,)))
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


def _remove_constant_concept(path: Path, parameters: _Parameters, concept: Any) -> _Parameters:
    """Turn the constant concept of `export_overcomplete`, the last one, into the decoder's bias."""
    W_e, b_e, W_d, _, threshold, _ = parameters
    last = len(W_e) - 1
    if concept != last or W_e[last].any():
        raise HeadSteerError(f"{path}: concept {concept} is not constant; export it again")
    return parameters._replace(
        W_e=W_e[:last], b_e=b_e[:last], W_d=W_d[:last], b_d=b_e[last] * W_d[last], threshold=threshold[:last]
    )


def _to_bytes(tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """Return the content of a .safetensors file with float32 tensors."""
    return save({name: np.asarray(value, np.float32, order="C") for name, value in tensors.items()}, metadata)


def _read_file(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a .safetensors file, float32 and finite."""
    if not path.is_file() or path.suffix != ".safetensors":
        raise HeadSteerError(f"{path}: no such .safetensors file; choose an SAE's file that is there")
    return weights.read_tensors(path)


def _read_tensor(path: Path, tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """Return a tensor in float64 after checking its shape, in which None is any length."""
    if name not in tensors:
        raise HeadSteerError(f"{path}: there is no tensor {name!r}, which an SAE of this kind has; save it again")
    actual = tensors[name].shape
    if len(actual) != len(shape) or any(b not in (a, None) for a, b in zip(actual, shape, strict=True)):
        expected = ", ".join("any" if length is None else str(length) for length in shape)
        raise HeadSteerError(
            f"{path}: tensor {name!r} has the shape {list(actual)}, not [{expected}] as the file's other entries "
            "require; save it again"
        )
    return tensors[name].astype(np.float64)


def _read_object(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a JSON object's field that is an object itself; an empty one if it is not."""
    value = values.get(name)
    return value if isinstance(value, dict) else {}


def _read_integer(path: Path, values: Mapping[str, Any], name: str, maximum: int | None = None) -> int:
    """Return a JSON object's field that is a positive integer."""
    value = values.get(name)
    if type(value) is not int or not 1 <= value <= (maximum or value):
        allowed = f"1 to {maximum}" if maximum else "1 and more"
        raise HeadSteerError(f"{path}: {name} = {value!r}; it must be a whole number, {allowed}: save it again")
    return value


def _to_imported(path: Path, parameters: _Parameters, activation: str, k: int | None, width: int | None) -> Imported:
    """Check the width and make an autoencoder of the parameters."""
    W_e, b_e, W_d, b_d, threshold, subtracts_b_d = parameters
    D = len(b_d)
    if width not in (None, D):
        raise HeadSteerError(f"{path}: it reads residuals of width {D}, the model's are {width} wide; choose another")
    b_e = b_e if subtracts_b_d else b_e + W_e @ b_d
    weights = SAEWeights(*(jnp.asarray(value, jnp.float32) for value in (W_e, b_e, W_d, b_d, threshold)))
    scaling = Scaling(np.zeros(D, np.float32), np.asarray(1.0, np.float32))
    return Imported(Autoencoder(weights, scaling, k if activation == "topk" else None), activation, k)
