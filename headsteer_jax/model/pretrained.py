"""Pretrained backbones: a published file's tensors become our parameters, and ours leave under timm's names.

What differs in shape is resampled: positions to the model's grid, patch kernels to its patch size. LayerScale is
folded into the matrix before it, which leaves the function as it was. The gates stay as they were.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.config.schema import Config
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.weights import TIMM, locate_weights, read_tensors, recognise_layout


class Loaded(NamedTuple):
    """What became of a file's tensors and of the model's parameters."""

    path: str
    family: str  # whose names the file has
    loaded: list[str]  # tensors of the file
    resampled: list[str]  # those of them that were fitted to another grid or patch size
    folded: list[str]  # LayerScale
    ignored: list[str]  # tensors that the model has no use for
    random: list[str]  # parameters of the model that are not in the file

    def __str__(self) -> str:
        def some(names: list[str]) -> str:
            return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "none"

        return (
            f"{self.path} ({self.family}): loaded {len(self.loaded)} tensors; resampled {some(self.resampled)}; "
            f"folded {some(self.folded)}; ignored {some(self.ignored)}; left random {some(self.random)}"
        )


def resample_positions(positions_1ND: np.ndarray, grid: int) -> np.ndarray:
    """[1, n^2, D] position embeddings of the patches -> [1, grid^2, D], bicubic with antialiasing as timm does it."""
    side, width = math.isqrt(positions_1ND.shape[1]), positions_1ND.shape[2]
    resized = jax.image.resize(
        positions_1ND.reshape(1, side, side, width), (1, grid, grid, width), "cubic", antialias=True
    )
    return np.asarray(resized).reshape(1, -1, width)


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


def load_backbone(params: Mapping[str, Any], config: Config) -> tuple[dict[str, Any], Loaded]:
    """The model's variables with the backbone of config.model.pretrained in place.

    Args:
      params: variables {"params": ...} as `init` makes them; the gates are kept, and the head unless
        config.model.pretrained_head.

    Raises:
      HeadSteerError: the file cannot be had or read, is of no known family, or a tensor is missing, surplus or
        misshapen; it names the tensor as the file does.
    """
    m, path = config.model, locate_weights(config.model.pretrained)
    tensors = read_tensors(path)
    layout, prefix = recognise_layout(path, tensors)
    left, resampled, folded, taken = dict(tensors), [], [], []
    heads, head_width = m.heads, m.width // m.heads

    def take(name: str, *shape: int | None) -> np.ndarray:
        """The tensor of this name and shape, where None is any length."""
        name = prefix + name
        if name not in tensors:
            raise HeadSteerError(
                f"{path}: there is no tensor {name!r}, which {layout.family}'s models of this kind have"
            )
        tensor = tensors[name]
        fits = len(shape) == tensor.ndim and all(a in (b, None) for a, b in zip(shape, tensor.shape, strict=True))
        if not fits:
            wanted = ", ".join("any" if length is None else str(length) for length in shape)
            raise HeadSteerError(
                f"{path}: tensor {name!r} has the shape {list(tensor.shape)}, not [{wanted}]; set config.model and "
                "config.data.channels to the file's model, or choose another file"
            )
        if left.pop(name, None) is not None:
            taken.append(name)
        return tensor

    def norm(module: str, layer: int | None = None) -> dict[str, np.ndarray]:
        return {leaf: take(layout.name(module, leaf, layer), m.width) for leaf in ("scale", "bias")}

    def dense(module: str, outputs: int, inputs: int, layer: int | None = None) -> dict[str, np.ndarray]:
        """A linear layer, its kernel [inputs, outputs]; LayerScale, where it has one, folded in."""
        kernel_name, bias_name = (layout.name(module, leaf, layer) for leaf in ("kernel", "bias"))
        if layout.fused and module in ("query", "key", "value"):
            rows = slice(*(m.width * ("query", "key", "value").index(module) + np.array([0, m.width])))
            return {
                "kernel": take(kernel_name, 3 * m.width, inputs)[rows].T,
                "bias": take(bias_name, 3 * m.width)[rows],
            }
        if layout.flax and module in ("query", "key", "value"):
            kernel = take(kernel_name, inputs, heads, head_width).reshape(inputs, outputs)
            return {"kernel": kernel, "bias": take(bias_name, heads, head_width).reshape(outputs)}
        if layout.flax:
            shape = (heads, head_width, outputs) if module == "out" else (inputs, outputs)
            kernel = take(kernel_name, *shape).reshape(inputs, outputs)
        else:
            kernel = take(kernel_name, outputs, inputs).T
        bias = take(bias_name, outputs)
        scale = layout.scales.get(module, "").format(layer)
        if scale and prefix + scale in tensors:
            gamma = take(scale, outputs)
            folded.append(prefix + scale)
            kernel, bias = kernel * gamma, bias * gamma
        return {"kernel": kernel, "bias": bias}

    before, after = (prefix + layout.modules["norm1"]).split("{}")
    blocks = {
        int(name[len(before) :].removesuffix(after + layout.leaves["bias"]))
        for name in tensors
        if name.startswith(before) and name.endswith(after + layout.leaves["bias"])
    }
    if blocks and blocks != set(range(m.depth)):
        raise HeadSteerError(f"{path}: it has {max(blocks) + 1} blocks; config.model.depth = {m.depth}")
    new: dict[str, Any] = {**params["params"], "norm": norm("norm"), "cls": take(layout.tokens["cls"], 1, 1, m.width)}

    kernel_name, channels = layout.name("patches", "kernel"), config.data.channels
    if layout.flax:
        kernel = take(kernel_name, None, None, channels, m.width)
    else:
        kernel = take(kernel_name, m.width, channels, None, None).transpose(2, 3, 1, 0)
    if kernel.shape[0] != kernel.shape[1]:
        raise HeadSteerError(f"{path}: tensor {prefix + kernel_name!r}: its patches are not square")
    if kernel.shape[0] != m.patch:
        resampled.append(prefix + kernel_name)
        kernel = resample_patches(kernel, m.patch)
    new["patches"] = {"kernel": kernel, "bias": take(layout.name("patches", "bias"), m.width)}

    positions_name, grid = layout.tokens["positions"], config.data.image_size // m.patch
    positions = take(positions_name, 1, None, m.width)
    count = positions.shape[1]
    if math.isqrt(count - 1) ** 2 == count - 1:
        of_cls, of_patches = positions[:, :1], positions[:, 1:]
    elif math.isqrt(count) ** 2 == count:  # timm's models with registers: CLS has no position of its own
        of_cls, of_patches = np.zeros((1, 1, m.width), np.float32), positions
    else:
        raise HeadSteerError(
            f"{path}: tensor {prefix + positions_name!r}: {count} positions are no square of patches, "
            "with or without a CLS token"
        )
    if of_patches.shape[1] != grid**2:
        resampled.append(prefix + positions_name)
        of_patches = resample_positions(of_patches, grid)
    new["positions"] = np.concatenate([of_cls, of_patches], axis=1)

    registers = layout.tokens.get("registers", "")
    found = tensors[prefix + registers].shape[1] if prefix + registers in tensors else 0
    if found != m.registers:
        raise HeadSteerError(f"{path}: it has {found} register tokens; config.model.registers = {m.registers}")
    if m.registers:
        new["registers"] = take(registers, 1, m.registers, m.width)

    hidden = round(m.mlp_ratio * m.width)
    for layer in range(m.depth):
        new[f"layers_{layer}"] = {
            **new[f"layers_{layer}"],
            "norm1": norm("norm1", layer),
            **{part: dense(part, m.width, m.width, layer) for part in ("query", "key", "value", "out")},
            "norm2": norm("norm2", layer),
            "mlp_in": dense("mlp_in", hidden, m.width, layer),
            "mlp_out": dense("mlp_out", m.width, hidden, layer),
        }
    ignored = tuple(prefix + name for name in layout.ignored)
    if m.pretrained_head:
        prefix = "" if layout.modules["head"] + layout.leaves["bias"] in tensors else prefix  # beside the backbone
        new["head"] = dense("head", params["params"]["head"]["bias"].shape[0], m.width)
        if "pre_logits/kernel" in left:
            raise HeadSteerError(
                f"{path}: its head has a layer 'pre_logits', ours has none; set model.pretrained_head off"
            )
    else:
        heads_of = ("head.", "head/", "classifier.", "head_dist.")
        ignored += heads_of + tuple(prefix + name for name in heads_of)  # inside of the backbone's module or beside it
    surplus = [name for name in left if not name.startswith(ignored)]
    if surplus:
        raise HeadSteerError(
            f"{path}: this model has no place for the tensor {surplus[0]!r}; choose a plain ViT's file"
        )
    random = [
        jax.tree_util.keystr(place, simple=True, separator=".")
        for place, leaf in jax.tree_util.tree_leaves_with_path(new)
        if isinstance(leaf, jax.Array)  # what came from the file is NumPy's
    ]
    report = Loaded(str(path), layout.family, taken, resampled, folded, list(left), random)
    return {"params": jax.tree.map(jnp.asarray, new)}, report


def timm_tensors(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our variables under timm's names: a VisionTransformer without LayerScale loads them, the classifier included.

    The gates stay behind: timm's model runs every head.
    """
    ours = jax.tree.map(np.asarray, params["params"])
    tensors = {
        TIMM.tokens["cls"]: ours["cls"],
        TIMM.tokens["positions"]: ours["positions"],
        TIMM.name("patches", "kernel"): ours["patches"]["kernel"].transpose(3, 2, 0, 1),
        TIMM.name("patches", "bias"): ours["patches"]["bias"],
    }
    if "registers" in ours:  # timm adds positions to the patches alone: CLS's own goes into the token
        tensors[TIMM.tokens["registers"]] = ours["registers"]
        tensors[TIMM.tokens["cls"]] = ours["cls"] + ours["positions"][:, :1]
        tensors[TIMM.tokens["positions"]] = ours["positions"][:, 1:]

    def put(module: str, tree: Mapping[str, np.ndarray], layer: int | None = None) -> None:
        for leaf, value in tree.items():
            tensors[TIMM.name(module, leaf, layer)] = value.T if leaf == "kernel" else value

    put("norm", ours["norm"])
    put("head", ours["head"])
    for layer in range(sum(name.startswith("layers_") for name in ours)):
        block = ours[f"layers_{layer}"]
        for module in ("norm1", "out", "norm2", "mlp_in", "mlp_out"):
            put(module, block[module], layer)
        parts = [block[part] for part in ("query", "key", "value")]
        put(
            "query",
            {leaf: np.concatenate([part[leaf] for part in parts], axis=-1) for leaf in ("kernel", "bias")},
            layer,
        )
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
