"""Pretrained backbones: timm's tensors of a vision transformer, renamed and fitted to our model's shapes.

What differs in shape is resampled: positions to the model's grid, patch kernels to its patch size. LayerScale is
folded into the matrix before it, which leaves the function as it was. The head and the gates stay as they were.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load_file

from headsteer_jax.config import Config, HeadSteerError

IGNORED = ("head.", "mask_token")  # for other classes; only of use in pretraining


class Loaded(NamedTuple):
    """What became of a file's tensors and of the model's parameters."""

    path: str
    loaded: list[str]  # tensors of the file
    resampled: list[str]  # those of them that were fitted to another grid or patch size
    folded: list[str]  # LayerScale
    ignored: list[str]  # tensors that the model has no use for
    random: list[str]  # parameters of the model that are not in the file

    def __str__(self) -> str:
        def some(names: list[str]) -> str:
            return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "none"

        return (
            f"{self.path}: loaded {len(self.loaded)} tensors; resampled {some(self.resampled)}; "
            f"folded {some(self.folded)}; ignored {some(self.ignored)}; left random {some(self.random)}"
        )


def resample_positions(positions_1ND: np.ndarray, grid: int) -> np.ndarray:
    """[1, 1 + n^2, D] position embeddings -> [1, 1 + grid^2, D], bicubic with antialiasing as timm does it.

    The CLS token's stays as it is.
    """
    cls_11D, patches_1nD = positions_1ND[:, :1], positions_1ND[:, 1:]
    side, width = math.isqrt(patches_1nD.shape[1]), positions_1ND.shape[2]
    resized = jax.image.resize(
        patches_1nD.reshape(1, side, side, width), (1, grid, grid, width), "cubic", antialias=True
    )
    return np.concatenate([cls_11D, np.asarray(resized).reshape(1, -1, width)], axis=1)


def resample_patches(kernel_hwcD: np.ndarray, side: int) -> np.ndarray:
    """[h, h, channels, D] patch kernel -> [side, side, channels, D] by pseudo-inverse resize.

    With B the matrix that resizes a patch, the new kernel w' is the least-squares solution of <B x, w'> = <x, w> for
    all patches x (FlexiViT, arXiv:2212.08013, eq. 4): exact when patches grow. Bicubic with antialiasing, as in timm.
    """
    old = kernel_hwcD.shape[0]
    basis = np.eye(old * old, dtype=np.float32).reshape(-1, old, old)
    resize_on = np.asarray(jax.image.resize(basis, (old * old, side, side), "cubic", antialias=True), np.float64)
    solve_no = np.linalg.pinv(resize_on.reshape(old * old, side * side))  # of B's transpose
    flat = kernel_hwcD.reshape(old * old, -1).astype(np.float64)
    return (solve_no @ flat).reshape(side, side, *kernel_hwcD.shape[2:]).astype(np.float32)


def _find(where: str) -> Path:
    """A local file, or hf://owner/model's model.safetensors, downloaded once into the hub's cache."""
    if not where.startswith("hf://"):
        return Path(where)
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise HeadSteerError(
            f"config.model.pretrained = {where}: needs the extra hub: pip install 'headsteer-jax[hub]'"
        ) from None
    try:
        return Path(hf_hub_download(where.removeprefix("hf://"), "model.safetensors"))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise HeadSteerError(
            f"config.model.pretrained = {where}: cannot be downloaded ({type(error).__name__}: {reason}); "
            "check the name and the network, or name a local file"
        ) from None


def _read(path: Path) -> dict[str, np.ndarray]:
    """A safetensors file's tensors as float32.

    Raises:
      HeadSteerError: there is no such file, it is truncated or of another kind, or a tensor holds NaN.
    """
    if not path.is_file():
        raise HeadSteerError(f"config.model.pretrained = {path}: no such file")
    try:
        tensors = {name: np.asarray(tensor, np.float32) for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise HeadSteerError(f"{path}: truncated or not a safetensors file ({error}); download it again") from None
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise HeadSteerError(f"{path}: tensor {name!r} holds NaN or infinity; download it again")
    return tensors


def load_backbone(params: Mapping[str, Any], config: Config) -> tuple[dict[str, Any], Loaded]:
    """The model's variables with the backbone of config.model.pretrained in place.

    Args:
      params: variables {"params": ...} as `init` makes them; the gates and the head are kept.

    Raises:
      HeadSteerError: the file cannot be had or read, or a tensor is missing, surplus or misshapen; it names the tensor.
    """
    m, path = config.model, _find(config.model.pretrained)
    tensors = _read(path)
    left, resampled, folded = dict(tensors), [], []

    def take(name: str, *shape: int | None) -> np.ndarray:
        """The tensor of this name and shape, where None is any length."""
        if name not in left:
            raise HeadSteerError(f"{path}: there is no tensor {name!r}, which a vision transformer of timm's has")
        tensor = left.pop(name)
        fits = len(shape) == tensor.ndim and all(a in (b, None) for a, b in zip(shape, tensor.shape, strict=True))
        if not fits:
            wanted = ", ".join("any" if length is None else str(length) for length in shape)
            raise HeadSteerError(
                f"{path}: tensor {name!r} has the shape {list(tensor.shape)}, not [{wanted}]; set config.model and "
                "config.data.channels to the file's model, or choose another file"
            )
        return tensor

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": take(f"{name}.weight", m.width), "bias": take(f"{name}.bias", m.width)}

    def dense(name: str, outputs: int, inputs: int, scale: str = "") -> dict[str, np.ndarray]:
        """A linear layer; with the LayerScale tensor `scale`, where there is one, folded in."""
        kernel, bias = take(f"{name}.weight", outputs, inputs).T, take(f"{name}.bias", outputs)
        if scale in left:
            gamma = take(scale, outputs)
            folded.append(scale)
            kernel, bias = kernel * gamma, bias * gamma
        return {"kernel": kernel, "bias": bias}

    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}
    if blocks and blocks != set(range(m.depth)):
        raise HeadSteerError(f"{path}: it has {max(blocks) + 1} blocks; config.model.depth = {m.depth}")
    new: dict[str, Any] = {**params["params"], "norm": norm("norm"), "cls": take("cls_token", 1, 1, m.width)}

    kernel = take("patch_embed.proj.weight", m.width, config.data.channels, None, None).transpose(2, 3, 1, 0)
    if kernel.shape[0] != kernel.shape[1]:
        raise HeadSteerError(f"{path}: tensor 'patch_embed.proj.weight': its patches are not square")
    if kernel.shape[0] != m.patch:
        resampled.append("patch_embed.proj.weight")
        kernel = resample_patches(kernel, m.patch)
    new["patches"] = {"kernel": kernel, "bias": take("patch_embed.proj.bias", m.width)}

    positions, grid = take("pos_embed", 1, None, m.width), config.data.image_size // m.patch
    if math.isqrt(positions.shape[1] - 1) ** 2 != positions.shape[1] - 1:
        raise HeadSteerError(
            f"{path}: tensor 'pos_embed': {positions.shape[1]} positions are no CLS token and a square"
        )
    if positions.shape[1] != 1 + grid**2:
        resampled.append("pos_embed")
        positions = resample_positions(positions, grid)
    new["positions"] = positions

    hidden = round(m.mlp_ratio * m.width)
    for layer in range(m.depth):
        name = f"blocks.{layer}"
        qkv = dense(f"{name}.attn.qkv", 3 * m.width, m.width)
        kernels, biases = np.split(qkv["kernel"], 3, axis=1), np.split(qkv["bias"], 3)
        new[f"layers_{layer}"] = {
            **new[f"layers_{layer}"],
            "norm1": norm(f"{name}.norm1"),
            **{part: {"kernel": kernels[i], "bias": biases[i]} for i, part in enumerate(("query", "key", "value"))},
            "out": dense(f"{name}.attn.proj", m.width, m.width, f"{name}.ls1.gamma"),
            "norm2": norm(f"{name}.norm2"),
            "mlp_in": dense(f"{name}.mlp.fc1", hidden, m.width),
            "mlp_out": dense(f"{name}.mlp.fc2", m.width, hidden, f"{name}.ls2.gamma"),
        }
    surplus = [name for name in left if not name.startswith(IGNORED)]
    if surplus:
        raise HeadSteerError(
            f"{path}: this model has no place for the tensor {surplus[0]!r}; choose a plain ViT's file"
        )
    random = [
        jax.tree_util.keystr(place, simple=True, separator=".")
        for place, leaf in jax.tree_util.tree_leaves_with_path(new)
        if isinstance(leaf, jax.Array)  # what came from the file is NumPy's
    ]
    report = Loaded(str(path), [name for name in tensors if name not in left], resampled, folded, list(left), random)
    return {"params": jax.tree.map(jnp.asarray, new)}, report
