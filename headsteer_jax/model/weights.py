"""Weight files of vision transformers: how they are read as NumPy arrays, and each publisher's names of the tensors.

No pickle is ever executed: .safetensors and .npz hold none, and .pth goes through torch's weights-only loading.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load_file

from headsteer_jax.errors import HeadSteerError

SUFFIXES = (".safetensors", ".pth", ".pt", ".npz")


class Layout(NamedTuple):
    """A publisher's names of the tensors, by the names of our modules; {} stands for the layer's number."""

    family: str
    modules: dict[str, str]  # patches, norm, head; of a layer norm1, query, key, value, out, norm2, mlp_in, mlp_out
    tokens: dict[str, str]  # cls, positions, registers
    scales: dict[str, str]  # LayerScale of out and mlp_out
    leaves: dict[str, str]  # suffixes of kernel, bias and a norm's scale, with the separator
    fused: bool  # query, key and value are one matrix, in this order
    flax: bool  # kernels are [inputs, outputs], attention's with axes H and K, patches' [h, w, channels, D]
    ignored: tuple[str, ...]  # beginnings of names that the model has no use for, except the head's

    def name(self, module: str, leaf: str, layer: int | None = None) -> str:
        """Return the file's name of one of our tensors: of a module's `kernel`, `bias` or `scale`."""
        return self.modules[module].format(layer) + self.leaves[leaf]


TORCH = {"kernel": ".weight", "bias": ".bias", "scale": ".weight"}
TIMM = Layout(
    family="timm",
    modules={
        "patches": "patch_embed.proj", "norm": "norm", "head": "head", "norm1": "blocks.{}.norm1",
        "query": "blocks.{}.attn.qkv", "key": "blocks.{}.attn.qkv", "value": "blocks.{}.attn.qkv",
        "out": "blocks.{}.attn.proj", "norm2": "blocks.{}.norm2",
        "mlp_in": "blocks.{}.mlp.fc1", "mlp_out": "blocks.{}.mlp.fc2",
    },
    tokens={"cls": "cls_token", "positions": "pos_embed", "registers": "reg_token"},
    scales={"out": "blocks.{}.ls1.gamma", "mlp_out": "blocks.{}.ls2.gamma"},
    leaves=TORCH, fused=True, flax=False, ignored=("mask_token",),
)  # fmt: skip
# the authors' files of models with registers; without registers they have timm's names
DINOV2 = TIMM._replace(family="DINOv2", tokens=TIMM.tokens | {"registers": "register_tokens"})
HF_VIT = Layout(
    family="Hugging Face ViTModel",
    modules={
        "patches": "embeddings.patch_embeddings.projection", "norm": "layernorm", "head": "classifier",
        "norm1": "encoder.layer.{}.layernorm_before", "query": "encoder.layer.{}.attention.attention.query",
        "key": "encoder.layer.{}.attention.attention.key", "value": "encoder.layer.{}.attention.attention.value",
        "out": "encoder.layer.{}.attention.output.dense", "norm2": "encoder.layer.{}.layernorm_after",
        "mlp_in": "encoder.layer.{}.intermediate.dense", "mlp_out": "encoder.layer.{}.output.dense",
    },
    tokens={
        "cls": "embeddings.cls_token", "positions": "embeddings.position_embeddings",
        "registers": "embeddings.register_tokens",
    },
    scales={},
    leaves=TORCH, fused=False, flax=False, ignored=("embeddings.mask_token", "pooler."),
)  # fmt: skip
HF_DINOV2 = HF_VIT._replace(
    family="Hugging Face Dinov2Model",
    modules=HF_VIT.modules
    | {
        "norm1": "encoder.layer.{}.norm1", "norm2": "encoder.layer.{}.norm2",
        "mlp_in": "encoder.layer.{}.mlp.fc1", "mlp_out": "encoder.layer.{}.mlp.fc2",
    },
    scales={"out": "encoder.layer.{}.layer_scale1.lambda1", "mlp_out": "encoder.layer.{}.layer_scale2.lambda1"},
)  # fmt: skip
_BLOCK = "Transformer/encoderblock_{}"
AUGREG = Layout(
    family="google-research/vision_transformer",
    modules={
        "patches": "embedding", "norm": "Transformer/encoder_norm", "head": "head",
        "norm1": f"{_BLOCK}/LayerNorm_0",
        **{part: f"{_BLOCK}/MultiHeadDotProductAttention_1/{part}" for part in ("query", "key", "value", "out")},
        "norm2": f"{_BLOCK}/LayerNorm_2",
        "mlp_in": f"{_BLOCK}/MlpBlock_3/Dense_0", "mlp_out": f"{_BLOCK}/MlpBlock_3/Dense_1",
    },
    tokens={"cls": "cls", "positions": "Transformer/posembed_input/pos_embedding"},
    scales={},
    leaves={"kernel": "/kernel", "bias": "/bias", "scale": "/scale"}, fused=False, flax=True, ignored=("pre_logits/",),
)  # fmt: skip
# what may precede all names, if the backbone is a part of a larger model
PREFIXES = ("", "vit.", "dinov2.", "dinov2_with_registers.", "deit.", "module.", "backbone.")


def locate_weights(location: str) -> Path:
    """Return the path of a weight file; a file of the Hugging Face hub is downloaded once into its cache.

    Args:
      location: a path, hf://owner/model (its model.safetensors), or hf://owner/model/FILE.

    Raises:
      HeadSteerError: huggingface_hub is not installed, or the file cannot be downloaded.
    """
    if not location.startswith("hf://"):
        return Path(location)
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise HeadSteerError(
            f"config.model.pretrained = {location}: needs the extra hub: pip install 'headsteer-jax[hub]'"
        ) from None
    owner, _, model_and_file = location.removeprefix("hf://").partition("/")
    model, _, file = model_and_file.partition("/")
    try:
        return Path(hf_hub_download(f"{owner}/{model}", file or "model.safetensors"))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise HeadSteerError(
            f"config.model.pretrained = {location}: cannot be downloaded ({type(error).__name__}: {reason}); "
            "check the name and the network, or name a local file"
        ) from None


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a weight file's tensors as float32, by their names in the file.

    Raises:
      HeadSteerError: there is no such file, it is truncated or not of the type that its suffix says, or a tensor holds
        NaN.
    """
    if not path.is_file():
        raise HeadSteerError(f"config.model.pretrained = {path}: no such file")
    readers: dict[str, Callable[[Path], Mapping[str, Any]]] = {
        ".safetensors": load_file,
        ".npz": _read_npz,
        ".pth": _read_torch,
        ".pt": _read_torch,
    }
    if path.suffix not in readers:
        raise HeadSteerError(f"config.model.pretrained = {path}: must be a file that ends in {', '.join(SUFFIXES)}")
    try:
        tensors = {name: np.asarray(tensor, np.float32) for name, tensor in readers[path.suffix](path).items()}
    except HeadSteerError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, EOFError, RuntimeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise HeadSteerError(f"{path}: truncated or not a {path.suffix} file ({reason}); download it again") from None
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise HeadSteerError(f"{path}: tensor {name!r} holds NaN or infinity; download it again")
    return tensors


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        if file.read(2) != b"PK":  # np.load would read other formats too
            raise ValueError("not a zip archive")
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # zipfile and zlib have exceptions of their own
        raise ValueError(str(error)) from None


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise HeadSteerError(f"{path}: a {path.suffix} file needs the extra torch: pip install torch") from None
    import pickle

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise HeadSteerError(
            f"{path}: not a torch file that holds only tensors, and no other kind is loaded; "
            "save only its state_dict, or use a .safetensors file"
        ) from None
    for key in ("model", "state_dict", "teacher"):  # the training scripts of DeiT, timm and DINO wrap the weights
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise HeadSteerError(f"{path}: it holds no state_dict, a dict of tensors; save one with torch.save")
    return {name: tensor.float().numpy() for name, tensor in content.items()}


def recognise_layout(path: Path, tensors: Mapping[str, np.ndarray]) -> tuple[Layout, str]:
    """Find the layout whose names these tensors have, and the prefix of the backbone's names.

    Raises:
      HeadSteerError: there is none.
    """
    for prefix in PREFIXES:
        if prefix + "patch_embed.proj.weight" in tensors:
            return DINOV2 if prefix + "register_tokens" in tensors else TIMM, prefix
        if prefix + "embeddings.patch_embeddings.projection.weight" in tensors:
            of_vit = prefix + "encoder.layer.0.layernorm_before.weight" in tensors
            return HF_VIT if of_vit else HF_DINOV2, prefix
        if prefix + "embedding/kernel" in tensors:
            return AUGREG, prefix
    examples = ", ".join(map(repr, sorted(tensors)[:3]))
    raise HeadSteerError(
        f"{path}: no vision transformer under the names of timm, Hugging Face or "
        f"google-research/vision_transformer; its tensors begin with {examples or 'none'}; choose another file"
    )


def fingerprint_weights(location: str) -> str:
    """Hash."""
    import hashlib

    return hashlib.sha256(Path(location).read_bytes()).hexdigest() if Path(location).is_file() else ""
