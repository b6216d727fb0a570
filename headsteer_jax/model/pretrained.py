"""Pretrained backbones: a published file's tensors become our parameters, and ours are exported under timm's names.

Positions are resampled to the model's grid, and patch kernels to its patch size. LayerScale is folded into the matrix
before it, which does not change the function. The gates stay as they are.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.config.schema import Config
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.weights import TIMM, locate_weights, read_tensors, recognise_layout

HEADS = ("head.", "head/", "classifier.", "head_dist.")  # beginnings of names of classifiers


class Loaded(NamedTuple):
    """A report of how a file's tensors and the model's parameters were used."""

    path: str
    family: str  # the publisher whose names the file has
    loaded: list[str]  # the tensors that became parameters
    resampled: list[str]  # those of them that were resampled to another grid or patch size
    folded: list[str]  # the LayerScale tensors
    ignored: list[str]  # the tensors that the model does not need
    random: list[str]  # the parameters of the model that are not in the file

    def __str__(self) -> str:
        def summarise(names: list[str]) -> str:
            return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "none"

        return (
            f"{self.path} ({self.family}): loaded {len(self.loaded)} tensors; resampled {summarise(self.resampled)}; "
            f"folded {summarise(self.folded)}; ignored {summarise(self.ignored)}; left random {summarise(self.random)}"
        )


def resample_positions(positions_1ND: np.ndarray, grid: int) -> np.ndarray:
    """Resample the patches' positions as timm does, bicubic with antialiasing: [1, n^2, D] -> [1, grid^2, D]."""
    side, width = math.isqrt(positions_1ND.shape[1]), positions_1ND.shape[2]
    resized = jax.image.resize(
        positions_1ND.reshape(1, side, side, width), (1, grid, grid, width), "cubic", antialias=True
    )
    return np.asarray(resized).reshape(1, -1, width)


def resample_patches(kernel_hwcD: np.ndarray, side: int) -> np.ndarray:
    """Resample a patch kernel by pseudo-inverse resize: [h, h, channels, D] -> [side, side, channels, D].

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
    """Replace a model's backbone by the one of the file config.model.pretrained.

    Args:
      params: variables {"params": ...} as `init` makes them. The gates are kept, and so is the head unless
        config.model.pretrained_head is set.

    Returns:
      The new variables, and a report.

    Raises:
      HeadSteerError: the file cannot be downloaded or read, its layout is unknown, or a tensor is missing, surplus or
        misshapen; the message names the tensor as the file does.
    """
    m, reader = config.model, _BackboneReader(locate_weights(config.model.pretrained), config)
    reader.check_depth()
    new: dict[str, Any] = {
        **params["params"],
        "norm": reader.read_norm("norm"),
        "cls": reader.take(reader.token_name("cls"), 1, 1, m.width),
        "patches": reader.read_patches(),
        "positions": reader.read_positions(),
        **reader.read_registers(),
    }
    for layer in range(m.depth):
        new[f"layers_{layer}"] = {**new[f"layers_{layer}"], **reader.read_block(layer)}
    if m.pretrained_head:
        new["head"] = reader.read_head(params["params"]["head"]["bias"].shape[0])
    reader.check_surplus()
    random = [
        jax.tree_util.keystr(place, simple=True, separator=".")
        for place, leaf in jax.tree_util.tree_leaves_with_path(new)
        if isinstance(leaf, jax.Array)  # the file's tensors are NumPy arrays
    ]
    return {"params": jax.tree.map(jnp.asarray, new)}, reader.report(random)


class _BackboneReader:
    """A reader of a published file's tensors as our parameters, which records how each tensor was used."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        self.tensors = read_tensors(path)
        self.layout, self.prefix = recognise_layout(path, self.tensors)
        self.unused = dict.fromkeys(self.tensors)  # in the file's order
        self.loaded: list[str] = []
        self.resampled: list[str] = []
        self.folded: list[str] = []

    def name(self, module: str, leaf: str, layer: int | None = None) -> str:
        """Return the file's name of one of our tensors."""
        name = self.layout.name(module, leaf, layer)
        beside = module == "head" and self.layout.name("head", "bias") in self.tensors  # outside of the backbone
        return name if beside else self.prefix + name

    def token_name(self, token: str) -> str:
        """Return the file's name of cls, positions or registers."""
        return self.prefix + self.layout.tokens[token]

    def take(self, name: str, *shape: int | None) -> np.ndarray:
        """Return the file's tensor of this name, and count it as loaded.

        Args:
          shape: the shape that it must have, where None is any length.

        Raises:
          HeadSteerError: it is missing or has another shape.
        """
        if name not in self.tensors:
            raise HeadSteerError(
                f"{self.path}: there is no tensor {name!r}, which {self.layout.family}'s models of this kind have"
            )
        tensor = self.tensors[name]
        fits = len(shape) == tensor.ndim and all(a in (b, None) for a, b in zip(shape, tensor.shape, strict=True))
        if not fits:
            expected = ", ".join("any" if length is None else str(length) for length in shape)
            raise HeadSteerError(
                f"{self.path}: tensor {name!r} has the shape {list(tensor.shape)}, not [{expected}]; set config.model "
                "and config.data.channels to the file's model, or choose another file"
            )
        if name in self.unused:  # query, key and value may be parts of one tensor
            del self.unused[name]
            self.loaded.append(name)
        return tensor

    def check_depth(self) -> None:
        """Check that the file has as many blocks as the model.

        Raises:
          HeadSteerError: it has more or fewer.
        """
        before, after = (self.prefix + self.layout.modules["norm1"]).split("{}")
        after += self.layout.leaves["bias"]
        blocks = {
            int(name[len(before) :].removesuffix(after))
            for name in self.tensors
            if name.startswith(before) and name.endswith(after)
        }
        depth = self.config.model.depth
        if blocks and blocks != set(range(depth)):
            raise HeadSteerError(f"{self.path}: it has {max(blocks) + 1} blocks, but config.model.depth = {depth}")

    def read_norm(self, module: str, layer: int | None = None) -> dict[str, np.ndarray]:
        """Read a LayerNorm."""
        return {leaf: self.take(self.name(module, leaf, layer), self.config.model.width) for leaf in ("scale", "bias")}

    def read_dense(self, module: str, outputs: int, inputs: int, layer: int | None = None) -> dict[str, np.ndarray]:
        """Read a linear layer, its kernel as [inputs, outputs], with its LayerScale, if it has one, folded in."""
        kernel_name, bias_name = (self.name(module, leaf, layer) for leaf in ("kernel", "bias"))
        m, projection = self.config.model, module in ("query", "key", "value")
        head_width = m.width // m.heads
        if self.layout.fused and projection:
            start = m.width * ("query", "key", "value").index(module)
            rows = slice(start, start + m.width)
            kernel = self.take(kernel_name, 3 * m.width, inputs)[rows].T
            return {"kernel": kernel, "bias": self.take(bias_name, 3 * m.width)[rows]}
        if self.layout.flax and projection:
            kernel = self.take(kernel_name, inputs, m.heads, head_width).reshape(inputs, outputs)
            return {"kernel": kernel, "bias": self.take(bias_name, m.heads, head_width).reshape(outputs)}
        if self.layout.flax:
            shape = (m.heads, head_width, outputs) if module == "out" else (inputs, outputs)
            kernel = self.take(kernel_name, *shape).reshape(inputs, outputs)
        else:
            kernel = self.take(kernel_name, outputs, inputs).T
        bias = self.take(bias_name, outputs)
        return self._fold_scale(module, layer, {"kernel": kernel, "bias": bias})

    def _fold_scale(self, module: str, layer: int | None, dense: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Multiply a linear layer by its LayerScale, if the file has one."""
        scale_name = self.prefix + self.layout.scales.get(module, "").format(layer)
        if module not in self.layout.scales or scale_name not in self.tensors:
            return dense
        gamma = self.take(scale_name, len(dense["bias"]))
        self.folded.append(scale_name)
        return {leaf: value * gamma for leaf, value in dense.items()}

    def read_patches(self) -> dict[str, np.ndarray]:
        """Read the patch embedding, resampled to the model's patch size."""
        m, name, channels = self.config.model, self.name("patches", "kernel"), self.config.data.channels
        if self.layout.flax:
            kernel = self.take(name, None, None, channels, m.width)
        else:
            kernel = self.take(name, m.width, channels, None, None).transpose(2, 3, 1, 0)
        if kernel.shape[0] != kernel.shape[1]:
            raise HeadSteerError(f"{self.path}: tensor {name!r}: its patches are not square")
        if kernel.shape[0] != m.patch:
            self.resampled.append(name)
            kernel = resample_patches(kernel, m.patch)
        return {"kernel": kernel, "bias": self.take(self.name("patches", "bias"), m.width)}

    def read_positions(self) -> np.ndarray:
        """Read the positions of CLS and the patches, resampled to the model's grid: [1, 1 + grid^2, D]."""
        m, name = self.config.model, self.token_name("positions")
        grid = self.config.data.image_size // m.patch
        positions = self.take(name, 1, None, m.width)
        count = positions.shape[1]
        if math.isqrt(count - 1) ** 2 == count - 1:
            cls_11D, patches_1ND = positions[:, :1], positions[:, 1:]
        elif math.isqrt(count) ** 2 == count:  # in timm's models with registers CLS has no position
            cls_11D, patches_1ND = np.zeros((1, 1, m.width), np.float32), positions
        else:
            raise HeadSteerError(
                f"{self.path}: tensor {name!r}: {count} positions do not form a square of patches, with or "
                "without a CLS token"
            )
        if patches_1ND.shape[1] != grid**2:
            self.resampled.append(name)
            patches_1ND = resample_positions(patches_1ND, grid)
        return np.concatenate([cls_11D, patches_1ND], axis=1)

    def read_registers(self) -> dict[str, np.ndarray]:
        """Read the register tokens, as an entry of the parameters if the model has any.

        Raises:
          HeadSteerError: the file has another number of them than the model.
        """
        m, name = self.config.model, self.prefix + self.layout.tokens.get("registers", "")
        count = self.tensors[name].shape[1] if name in self.tensors else 0
        if count != m.registers:
            raise HeadSteerError(
                f"{self.path}: it has {count} register tokens, but config.model.registers = {m.registers}"
            )
        return {"registers": self.take(name, 1, m.registers, m.width)} if m.registers else {}

    def read_block(self, layer: int) -> dict[str, dict[str, np.ndarray]]:
        """Read a block except its gate."""
        width, hidden = self.config.model.width, round(self.config.model.mlp_ratio * self.config.model.width)
        return {
            "norm1": self.read_norm("norm1", layer),
            **{part: self.read_dense(part, width, width, layer) for part in ("query", "key", "value", "out")},
            "norm2": self.read_norm("norm2", layer),
            "mlp_in": self.read_dense("mlp_in", hidden, width, layer),
            "mlp_out": self.read_dense("mlp_out", width, hidden, layer),
        }

    def read_head(self, classes: int) -> dict[str, np.ndarray]:
        """Read the classifier.

        Raises:
          HeadSteerError: it has another number of classes, or one layer more than ours.
        """
        head = self.read_dense("head", classes, self.config.model.width)
        if "pre_logits/kernel" in self.unused:
            raise HeadSteerError(
                f"{self.path}: its head has a layer 'pre_logits', which our model does not have; "
                "set model.pretrained_head=false"
            )
        return head

    def check_surplus(self) -> None:
        """Check that every tensor was loaded, except those that the model does not need.

        Raises:
          HeadSteerError: the file has a tensor for which the model has no place.
        """
        ignored = tuple(self.prefix + name for name in self.layout.ignored)
        if not self.config.model.pretrained_head:
            ignored += HEADS + tuple(self.prefix + name for name in HEADS)
        surplus = [name for name in self.unused if not name.startswith(ignored)]
        if surplus:
            raise HeadSteerError(
                f"{self.path}: this model has no place for the tensor {surplus[0]!r}; choose a plain ViT's file"
            )

    def report(self, random: list[str]) -> Loaded:
        """Report how the tensors were used; `random` are the parameters that are not in the file."""
        return Loaded(
            str(self.path), self.layout.family, self.loaded, self.resampled, self.folded, list(self.unused), random
        )


def timm_tensors(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Rename our variables as timm does, classifier included, for its VisionTransformer without LayerScale.

    The gates are left out: timm's model runs every head.
    """
    ours = jax.tree.map(np.asarray, params["params"])
    tensors = {
        TIMM.tokens["cls"]: ours["cls"],
        TIMM.tokens["positions"]: ours["positions"],
        TIMM.name("patches", "kernel"): ours["patches"]["kernel"].transpose(3, 2, 0, 1),
        TIMM.name("patches", "bias"): ours["patches"]["bias"],
    }
    if "registers" in ours:  # timm adds positions to the patches alone, so CLS's position goes into its token
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
