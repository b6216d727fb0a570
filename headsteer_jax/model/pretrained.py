"""Pretrained backbones: a published file's tensors become our parameters, and ours are exported under timm's names.

Positions are resampled to the model's grid, and patch kernels to its patch size. LayerScale is folded into the matrix
before it, and the position of a register or of a distillation token into that token; this does not change the
function. The gates stay as they are, unless the file has some; see model/pretrained_gates.py.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.config.schema import Config
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.file_config import Comparison, compare, read_file_config
from headsteer_jax.model.layouts import BIG_VISION, MAE, TIMM, find_backbone
from headsteer_jax.model.pretrained_gates import check_gates, find_gates, read_gates
from headsteer_jax.model.weights import check_finite, locate_weights, read_weights

logger = logging.getLogger(__name__)

HEADS = (  # beginnings of names of classifiers, and of the heads of self-supervised training
    "head.", "head/", "heads.", "classifier.", "head_dist.", "cls_classifier.", "distillation_classifier.", "fc.",
    "projector.", "predictor.", "projection_head.", "prototypes.", "dino_head.", "ibot_head.",
)  # fmt: skip


class Loaded(NamedTuple):
    """A report of how a file's tensors and the model's parameters were used."""

    path: str
    family: str  # the publisher whose names the file has
    choices: list[str]  # which of several sets of weights was taken, which prefix, what was assumed
    loaded: list[str]  # the tensors that became parameters
    resampled: list[str]  # those of them that were resampled to another grid or patch size
    folded: list[str]  # the LayerScale tensors
    absent: list[str]  # the biases that the file's model does not have; they are zero
    ignored: list[str]  # the tensors that the model does not need
    random: list[str]  # the parameters of the model that are not in the file
    source: str  # the description with which the config was compared, "" if there is none
    comparison: Comparison

    def __str__(self) -> str:
        def summarise(names: list[str]) -> str:
            return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "none"

        chosen = "".join(f"{choice}; " for choice in self.choices)
        absent = f"without {summarise(self.absent)}, which are zero; " if self.absent else ""
        checked, unchecked, _ = self.comparison
        lacking = f"{self.source} does not state them" if self.source else "there is no config.json beside it"
        checks = f"; compared: {', '.join(checked)}" if checked else ""
        checks += f"; not checked, because {lacking}: {', '.join(unchecked)}" if unchecked else ""
        return (
            f"{self.path} ({self.family}): {chosen}loaded {len(self.loaded)} tensors; {absent}"
            f"resampled {summarise(self.resampled)}; folded {summarise(self.folded)}; "
            f"ignored {summarise(self.ignored)}; left random {summarise(self.random)}{checks}"
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


def load_backbone(
    params: Mapping[str, Any], config: Config, class_names: Sequence[str] = ()
) -> tuple[dict[str, Any], Loaded]:
    """Replace a model's backbone by the one of the file config.model.pretrained.

    Args:
      params: variables {"params": ...} as `init` makes them. Gates that the file does not have are kept, and so is the
        head unless config.model.pretrained_head is set.
      class_names: of the dataset; a kept head must have them in the same order, if its file names them.

    Returns:
      The new variables, and a report.

    Raises:
      HeadSteerError: the file cannot be downloaded or read, its layout is unknown, its own description disagrees with
        the config, or a tensor is missing, surplus or misshapen; the message names the tensor as the file does.
    """
    head = params["params"]["head"]["bias"].shape[0]
    read, reader, comparison = _read_backbone(config, class_names, head)
    new: dict[str, Any] = {**params["params"], **read}
    for layer in range(config.model.depth):
        name = f"layers_{layer}"
        new[name] = {**params["params"][name], **read[name]}
    random = [
        jax.tree_util.keystr(place, simple=True, separator=".")
        for place, leaf in jax.tree_util.tree_leaves_with_path(new)
        if isinstance(leaf, jax.Array)  # the file's tensors are NumPy arrays
    ]
    report = reader.report(random, comparison)
    for warning in report.comparison.warnings:
        logger.warning(warning)
    return {"params": jax.tree.map(jnp.asarray, new)}, report


def check_backbone(config: Config, class_names: Sequence[str]) -> None:
    """Check that config.model.pretrained can be loaded, as `load_backbone` does, without a model.

    Raises:
      HeadSteerError: it cannot.
    """
    _read_backbone(config, class_names, len(class_names))


def _read_backbone(
    config: Config, class_names: Sequence[str], classes: int
) -> tuple[dict[str, Any], "_BackboneReader", Comparison]:
    """Read all of our parameters that the file holds, compare it with the config, and check that nothing is left."""
    m, reader = config.model, _BackboneReader(config)
    reader.check_depth()
    reader.check_norms()
    comparison = compare(reader.described, config, class_names)
    read: dict[str, Any] = {
        "norm": reader.read_norm("norm"),
        "patches": reader.read_patches(),
        **reader.read_tokens(),
        **{f"layers_{layer}": reader.read_block(layer) for layer in range(m.depth)},
    }
    if m.pretrained_head:
        read["head"] = reader.read_head(classes)
    reader.check_surplus()
    return read, reader, comparison


class _BackboneReader:
    """A reader of a published file's tensors as our parameters, which records how each tensor was used."""

    def __init__(self, config: Config) -> None:
        weights = read_weights(locate_weights(config.model.pretrained))
        self.path, self.config = weights.path, config
        self.layout, self.prefix, self.tensors, choice = find_backbone(weights.path, weights.tensors)
        self.described = read_file_config(weights.path, weights.arguments, self.layout)
        self.gates = find_gates(weights.path, self.layout, self.prefix, self.tensors, config)
        self.gate_warnings = check_gates(weights.path, self.gates, config, weights.arguments)
        self.choices = [f"takes {choice}" for choice in (weights.choice, choice) if choice]
        self.choices += [f"leaves out its gates of {', '.join(self.gates.left_out)}"] if self.gates.left_out else []
        self.choices += [f"under the prefix {self.prefix!r}"] if self.prefix else []
        self.square = ""  # the grid that is assumed
        self.unused = dict.fromkeys(self.tensors)  # in the file's order
        self.loaded: list[str] = []
        self.resampled: list[str] = []
        self.folded: list[str] = []
        self.absent: list[str] = []

    def name(self, module: str, leaf: str, layer: int | None = None) -> str:
        """Return the file's name of one of our tensors; a classifier may be outside of the backbone."""
        name = self.layout.name(module, leaf, layer)
        prefixes = [self.prefix]
        if module == "head":
            parts = re.findall(r"[^./]+[./]", self.prefix)
            prefixes = ["".join(parts[:count]) for count in range(len(parts), -1, -1)]
        return next((prefix + name for prefix in prefixes if prefix + name in self.tensors), self.prefix + name)

    def token_name(self, token: str) -> str:
        """Return the file's name of cls, positions, registers or distillation."""
        return self.prefix + self.layout.tokens.get(token, token)

    def take(self, name: str, *shape: int | None) -> np.ndarray:
        """Return the file's tensor of this name, and count it as loaded.

        Args:
          shape: the shape that it must have, where None is any length.

        Raises:
          HeadSteerError: it is missing or has another shape.
        """
        if name not in self.tensors:
            raise HeadSteerError(
                f"{self.path}: there is no tensor {name!r}, which {self.layout.family}'s models of this "
                "kind have; choose another file"
            )
        tensor = self.tensors[name]
        fits = len(shape) == tensor.ndim and all(a in (b, None) for a, b in zip(shape, tensor.shape, strict=True))
        if not fits:
            expected = ", ".join("any" if length is None else str(length) for length in shape)
            raise HeadSteerError(
                f"{self.path}: tensor {name!r} has the shape {list(tensor.shape)}, not [{expected}]; set config.model "
                "and config.data.channels to the file's model, or choose another file"
            )
        check_finite(self.path, name, tensor)
        if name in self.unused:  # query, key and value may be parts of one tensor
            del self.unused[name]
            self.loaded.append(name)
        return tensor

    def check_depth(self) -> None:
        """Check that the file has as many blocks as the model.

        Raises:
          HeadSteerError: it has more or fewer.
        """
        block = self.prefix + self.layout.modules["norm1"].partition("{}")[0]
        numbers = (re.match(r"\d+", name.removeprefix(block)) for name in self.tensors if name.startswith(block))
        blocks = {int(number[0]) for number in numbers if number}
        depth = self.config.model.depth
        if blocks and blocks != set(range(depth)):
            raise HeadSteerError(
                f"{self.path}: it has {max(blocks) + 1} blocks, but config.model.depth = {depth}; set "
                f"config.model.depth={max(blocks) + 1}"
            )

    def check_norms(self) -> None:
        """Check that the norms and the MLP are of our kind, as far as the names and shapes say.

        Raises:
          HeadSteerError: there is no final norm, the norms have no bias, or the MLP is gated.
        """
        if self.name("norm", "scale") not in self.tensors:
            raise HeadSteerError(
                f"{self.path}: there is no tensor {self.name('norm', 'scale')!r}: it has no norm after the blocks "
                "(final_norm), which this model has; choose a plain ViT's file"
            )
        if self.name("norm", "bias") not in self.tensors and self.name("norm1", "bias", 0) not in self.tensors:
            raise HeadSteerError(
                f"{self.path}: there is no tensor {self.name('norm', 'bias')!r}: its norms have no bias, as RMSNorm's, "
                "and this model's are LayerNorms; choose a plain ViT's file"
            )
        names = [self.name(part, "kernel", 0) for part in ("mlp_in", "mlp_out")]
        first, second = (self.tensors[name].shape if name in self.tensors else () for name in names)
        inner, outer = (1, 0) if self.layout.flax else (0, 1)  # the axes of the hidden width
        if len(first) == len(second) == 2 and first[inner] == 2 * second[outer]:
            raise HeadSteerError(
                f"{self.path}: tensor {names[0]!r} has the shape {list(first)}: its MLP "
                "is gated (GluMlp, SwiGLU), and this model's is not; choose a plain ViT's file"
            )

    def read_norm(self, module: str, layer: int | None = None) -> dict[str, np.ndarray]:
        """Read a LayerNorm."""
        return {leaf: self.take(self.name(module, leaf, layer), self.config.model.width) for leaf in ("scale", "bias")}

    def read_dense(self, module: str, outputs: int, inputs: int, layer: int | None = None) -> dict[str, np.ndarray]:
        """Read a linear layer, its kernel as [inputs, outputs], with its LayerScale, if it has one, folded in."""
        kernel_name = self.name(module, "kernel", layer)
        m, projection = self.config.model, module in ("query", "key", "value")
        head_width = m.width // m.heads
        if self.layout.fused and projection:
            start = m.width * ("query", "key", "value").index(module)
            rows = slice(start, start + m.width)
            kernel = self.take(kernel_name, 3 * m.width, inputs)[rows].T
            return {"kernel": kernel, "bias": self._take_bias(module, layer, 3 * m.width)[rows]}
        if self.layout.flax and projection:
            kernel = self.take(kernel_name, inputs, m.heads, head_width).reshape(inputs, outputs)
            bias = self._take_bias(module, layer, m.heads, head_width)
            return {"kernel": kernel, "bias": bias.reshape(outputs)}
        if self.layout.flax:
            shape = (m.heads, head_width, outputs) if module == "out" else (inputs, outputs)
            kernel = self.take(kernel_name, *shape).reshape(inputs, outputs)
        else:
            kernel = self.take(kernel_name, outputs, inputs).T
        bias = self._take_bias(module, layer, outputs)
        return self._fold_scale(module, layer, {"kernel": kernel, "bias": bias})

    def _take_bias(self, module: str, layer: int | None, *shape: int) -> np.ndarray:
        """Return a linear layer's bias, which is zero if no layer of the file has one."""
        names = [self.name(module, "bias", number) for number in range(self.config.model.depth)]
        if layer is None or any(name in self.tensors for name in names):
            return self.take(self.name(module, "bias", layer), *shape)
        if names[layer] not in self.absent:
            self.absent.append(names[layer])
        return np.zeros(shape, np.float32)

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
            raise HeadSteerError(f"{self.path}: tensor {name!r}: its patches are not square; choose another file")
        if kernel.shape[0] != m.patch:
            self.resampled.append(name)
            kernel = resample_patches(kernel, m.patch)
        return {"kernel": kernel, "bias": self.take(self.name("patches", "bias"), m.width)}

    def read_tokens(self) -> dict[str, np.ndarray]:
        """Read the class token, the registers (a distillation token is one) and all positions, on the model's grid.

        Raises:
          HeadSteerError: there is no class token, the file has another number of registers than the model, or its
            positions form no square.
        """
        m, cls_name = self.config.model, self.token_name("cls")
        if cls_name not in self.tensors:
            raise HeadSteerError(
                f"{self.path}: there is no tensor {cls_name!r}: its model has no class token, which this model's gates "
                "and classifier read; choose another file"
            )
        tokens = {"cls": self.take(cls_name, 1, 1, m.width)}
        names = [self.token_name(token) for token in ("distillation", "registers")]
        extra = [self.take(name, 1, None, m.width) for name in names if name in self.tensors]
        registers = np.concatenate([np.zeros((1, 0, m.width), np.float32), *extra], axis=1)
        count = registers.shape[1]
        if count != m.registers:
            kind = ("distillation" if names[0] in self.tensors else "register") + " token" + "s" * (count != 1)
            raise HeadSteerError(
                f"{self.path}: it has {count} {kind}, but config.model.registers = {m.registers}; set "
                f"config.model.registers={count}"
            )
        leading_1ND, patches_1ND = self._read_positions(count)
        if leading_1ND.shape[1] == 1 + count and count:
            registers = registers + leading_1ND[:, 1:]
        positions = np.concatenate([leading_1ND[:, :1], patches_1ND], axis=1)
        return tokens | {"positions": positions} | ({"registers": registers} if count else {})

    def _read_positions(self, registers: int) -> tuple[np.ndarray, np.ndarray]:
        """Read the positions of the leading tokens, [1, 1 or 1 + registers, D], and of the patches, [1, grid^2, D].

        If the leading tokens have none, theirs are zero.
        """
        m, name = self.config.model, self.token_name("positions")
        grid = self.config.data.image_size // m.patch
        if name not in self.tensors and self.described.value("positions") in ("", "none"):
            return np.zeros((1, 1, m.width), np.float32), np.zeros((1, grid**2, m.width), np.float32)
        positions = self.take(name, 1, None, m.width)
        leading = self._count_leading(positions.shape[1], registers)
        patches_1ND = positions[:, leading:]
        if patches_1ND.shape[1] != grid**2:
            self.resampled.append(name)
            patches_1ND = resample_positions(patches_1ND, grid)
        return positions[:, :leading] if leading else np.zeros((1, 1, m.width), np.float32), patches_1ND

    def _count_leading(self, count: int, registers: int) -> int:
        """Return how many of `count` positions are those of the class token and of registers.

        Raises:
          HeadSteerError: the patches' positions form no square, or may form several.
        """
        name, image = self.token_name("positions"), self.described.image()
        distilled = self.token_name("distillation") in self.tensors
        possible = [1 + distilled]  # registers have no positions
        if self.layout.family in (TIMM.family, MAE.family):  # they have positions, unless no_embed_class is set
            possible = {True: [0], False: [1 + registers]}.get(self.described.value("patches_only"), [0, 1 + registers])
        elif self.layout == BIG_VISION:
            possible = [0]
        if image:
            kernel = self.tensors[self.name("patches", "kernel")]
            height, width = kernel.shape[:2] if self.layout.flax else kernel.shape[2:]
            rows, columns = image[0] // height, image[1] // width
            fitting = [leading for leading in possible if count - leading == rows * columns]
            if not fitting or rows != columns:
                raise HeadSteerError(
                    f"{self.path}: tensor {name!r} has {count} positions, and {self.described.cite('image')}, which is "
                    f"a grid of {rows} x {columns} patches; this model's grid is square, so choose another file"
                )
            return fitting[0]
        numbers = {leading: count - leading for leading in possible if leading < count}
        squares = [leading for leading, number in sorted(numbers.items()) if math.isqrt(number) ** 2 == number]
        if not squares:
            raise HeadSteerError(
                f"{self.path}: tensor {name!r}: {count} positions do not form a square of patches, with or "
                "without a CLS token; choose another file"
            )
        if len(squares) > 1:  # a single patch is no grid
            squares = [leading for leading in squares if count - leading > 1]
        if len(squares) > 1:
            sides = " or ".join(str(math.isqrt(count - leading)) for leading in squares)
            raise HeadSteerError(
                f"{self.path}: tensor {name!r}: {count} positions may be a square of side {sides}; put the model's "
                "config.json beside the file"
            )
        side = math.isqrt(count - squares[0])
        self.square = f" (taken as a square, {side} x {side})"
        return squares[0]

    def read_block(self, layer: int) -> dict[str, Any]:
        """Read a block, with those of its gates that the file has."""
        width, hidden = self.config.model.width, round(self.config.model.mlp_ratio * self.config.model.width)
        return {
            "norm1": self.read_norm("norm1", layer),
            **{part: self.read_dense(part, width, width, layer) for part in ("query", "key", "value", "out")},
            "norm2": self.read_norm("norm2", layer),
            "mlp_in": self.read_dense("mlp_in", hidden, width, layer),
            "mlp_out": self.read_dense("mlp_out", width, hidden, layer),
            **read_gates(self.gates, layer, self.config, self.take),
        }

    def read_head(self, classes: int) -> dict[str, np.ndarray]:
        """Read the classifier.

        Raises:
          HeadSteerError: there is none, it has another number of classes, or it is of another kind than ours.
        """
        kernel = self.name("head", "kernel")
        reason = ""
        if self.token_name("distillation") in self.tensors:
            reason = "its classifier averages two heads, of the class token and of the distillation token"
        elif self.prefix + "pre_logits/kernel" in self.tensors:
            reason = "its head has a layer 'pre_logits', which our model does not have"
        elif kernel not in self.tensors:
            reason = f"there is no tensor {kernel!r}, so it has no classifier"
        elif self.tensors[kernel].shape == (classes, 2 * self.config.model.width):
            reason = "its classifier reads the class token and the patches' average"
        if reason:
            raise HeadSteerError(f"{self.path}: {reason}; set model.pretrained_head=false")
        return self.read_dense("head", classes, self.config.model.width)

    def check_surplus(self) -> None:
        """Check that every tensor of the backbone was loaded, except those that the model does not need.

        Raises:
          HeadSteerError: the file has a tensor for which the model has no place.
        """
        ignored = tuple(self.prefix + name for name in self.layout.ignored)
        ignored += self.gates.unneeded
        if not self.config.model.pretrained_head:
            ignored += tuple(self.prefix + name for name in HEADS)
        surplus = [name for name in self.unused if name.startswith(self.prefix) and not name.startswith(ignored)]
        if surplus:
            raise HeadSteerError(
                f"{self.path}: this model has no place for the tensor {surplus[0]!r}; choose a plain ViT's file"
            )

    def report(self, random: list[str], comparison: Comparison) -> Loaded:
        """Report how the tensors were used; `random` are the parameters that are not in the file."""
        checked, unchecked, warnings = comparison
        warnings = [*warnings, *self.gate_warnings]
        if self.layout.flax:  # its attention's shapes have an axis of heads
            checked, unchecked = ["heads", *checked], [name for name in unchecked if name != "heads"]
            if self.config.model.gelu == "exact":
                warnings = [
                    *warnings,
                    f"{self.path}: {self.layout.family} computes GELU by tanh, but model.gelu = exact",
                ]
        unchecked = [name + self.square if name == "grid" else name for name in unchecked]
        return Loaded(
            str(self.path), self.layout.family, self.choices, self.loaded, self.resampled, self.folded, self.absent,
            list(self.unused), random, self.described.source, Comparison(checked, unchecked, warnings),
        )  # fmt: skip


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
