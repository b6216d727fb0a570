"""A deployed model as an ONNX file, for runtimes that know nothing of JAX.

The graph is built operation by operation, as `model.py` computes. The image's resize is two products with constant
matrices, so that it is JAX's and not a runtime's. Axes are those of `model.py`.
"""

import math
from typing import Any

import jax
import numpy as np

from headsteer_jax.config.schema import GATE_KINDS
from headsteer_jax.deploy.model import DeployedModel, Params
from headsteer_jax.model.gates import threshold_logit

OPSET = 20  # the first with GELU as an operation
IR_VERSION = 9  # of the same age


class Graph:
    """A graph in the making: every method adds an operation and returns the name of its result."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._constants: dict[tuple[str, bytes], str] = {}

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Add an array, once for each content of up to 64 numbers."""
        from onnx import numpy_helper

        array = np.ascontiguousarray(value, dtype)
        key = (
            f"{array.dtype}{array.shape}",
            array.tobytes() if array.size <= 64 else str(len(self.initializers)).encode(),
        )
        if key not in self._constants:
            self._constants[key] = f"c{len(self.initializers)}"
            self.initializers.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def add(self, operation: str, *inputs: str, **attributes: Any) -> str:
        """Add an operation with one result."""
        return self.split(operation, 1, *inputs, **attributes)[0]

    def split(self, operation: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """Add an operation with several results."""
        from onnx import helper

        names = [f"{operation.lower()}{len(self.nodes)}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(operation, list(inputs), names, **attributes))
        return names

    def reshape(self, x: str, *shape: int) -> str:
        """Reshape; 0 keeps an axis, and -1 is what is left."""
        return self.add("Reshape", x, self.constant(shape, np.int64))

    def slice(self, x: str, axis: int, begin: int, end: int) -> str:
        """Take the entries from `begin` to `end` of an axis."""
        return self.add("Slice", x, *(self.constant([value], np.int64) for value in (begin, end, axis)))

    def dense(self, x: str, layer: Params) -> str:
        """Apply a dense layer to the last axis."""
        return self.add("Add", self.add("MatMul", x, self.constant(layer["kernel"])), self.constant(layer["bias"]))

    def times(self, x: str, factor: str) -> str:
        """Multiply."""
        return self.add("Mul", x, factor)


def export_onnx(model: DeployedModel, batch: int | None = None) -> bytes:
    """Export a model: input `images` uint8 [B, height, width, channels], output `logits` float32 [B, C].

    Args:
      batch: a fixed B; None: any.

    Raises:
      ModuleNotFoundError: the package onnx is not installed.
    """
    import onnx
    from onnx import TensorProto, helper

    graph = Graph()
    x = _embed(graph, model, _preprocess(graph, model, "images"))
    for layer in range(model.config.depth):
        x = _run_layer(graph, model, layer, x)
    x = _normalise(graph, model, graph.reshape(x, 0, -1), model.params["norm"])
    logits = graph.dense(x, model.params["head"])
    graph.nodes[-1].output[0] = "logits"
    assert logits
    size: int | str = "batch" if batch is None else batch
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, [size, *model.config.image])
    answer = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [size, len(model.config.classes)])
    onnx_model = helper.make_model(
        helper.make_graph(graph.nodes, "headsteer", [images], [answer], graph.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="HeadSteer",
    )  # fmt: skip
    helper.set_model_props(onnx_model, {"classes": "\n".join(model.config.classes)})
    onnx.checker.check_model(onnx_model)
    return bytes(onnx_model.SerializeToString())


def _preprocess(graph: Graph, model: DeployedModel, images: str) -> str:
    """Crop, resize and normalise: uint8 [B, h, w, C] -> [B, C, S, S]."""
    data, (height, width, _) = model.config.data, model.config.image
    square = min(height, width)
    row, column = (height - square) // 2, (width - square) // 2
    if height != square:
        images = graph.slice(images, 1, row, row + square)
    if width != square:
        images = graph.slice(images, 2, column, column + square)
    x = graph.add("Cast", images, to=1)
    x = graph.add("Div", x, graph.constant(255.0))
    x = graph.add("Transpose", x, perm=[0, 3, 1, 2])
    if square != data.image_size:
        identity = np.eye(square, dtype=np.float32)
        resize = np.asarray(jax.image.resize(identity, (data.image_size, square), "bilinear", antialias=True))
        x = graph.add("MatMul", graph.add("MatMul", graph.constant(resize), x), graph.constant(resize.T))
    mean, std = (graph.constant(np.reshape(values, (-1, 1, 1))) for values in (data.mean, data.std))
    return graph.add("Div", graph.add("Sub", x, mean), std)


def _embed(graph: Graph, model: DeployedModel, x: str) -> str:
    """Embed the patches and put CLS and the registers before them: [B, C, S, S] -> [B, T, D]."""
    config, params = model.config, model.params
    p, side = config.model.patch, config.data.image_size // config.model.patch
    x = graph.reshape(x, 0, config.data.channels, side, p, side, p)
    x = graph.reshape(graph.add("Transpose", x, perm=[0, 2, 4, 3, 5, 1]), 0, side * side, -1)
    x = graph.dense(x, params["patches"])
    count = graph.slice(graph.add("Shape", x), 0, 0, 1)
    prefix_shape = graph.constant(params["prefix"].shape, np.int64)
    prefix = graph.add("Expand", graph.constant(params["prefix"]), graph.add("Concat", count, prefix_shape, axis=0))
    return graph.add("Concat", prefix, x, axis=1)


def _normalise(graph: Graph, model: DeployedModel, x: str, norm: Params) -> str:
    scale, bias = graph.constant(norm["scale"]), graph.constant(norm["bias"])
    return graph.add("LayerNormalization", x, scale, bias, epsilon=model.config.model.layer_norm_epsilon)


def _run_layer(graph: Graph, model: DeployedModel, layer: int, x: str) -> str:
    """Run one layer: [B, T, D] -> [B, Q, D]."""
    config, params = model.config, model.params["layers"][layer]
    gates, last = _decide_gates(graph, model, layer, x), layer == config.depth - 1
    if "kernel" in params["out"]:
        added = graph.dense(_attend(graph, model, layer, x, gates), params["out"])
    else:
        added = graph.constant(params["out"]["bias"])
    x = graph.slice(x, 1, 0, 1) if last else x
    x = graph.add("Add", x, _gate_sublayer(graph, gates, added, 0, last))
    if "kernel" in params["mlp_out"]:
        n = _normalise(graph, model, x, params["norm2"])
        if config.gate is not None and config.gate.dropped == "slice" and "heads" in gates:
            wide = graph.add("Expand", graph.add("Unsqueeze", gates["heads"], graph.constant([2], np.int64)),
                             graph.constant([1, 1, config.head_width], np.int64))  # fmt: skip
            n = graph.times(n, graph.add("Unsqueeze", graph.reshape(wide, 0, -1), graph.constant([1], np.int64)))
        approximate = "none" if config.model.gelu == "exact" else "tanh"
        hidden = graph.add("Gelu", graph.dense(n, params["mlp_in"]), approximate=approximate)
        added = graph.dense(hidden, params["mlp_out"])
    else:
        added = graph.constant(params["mlp_out"]["bias"])
    return graph.add("Add", x, _gate_sublayer(graph, gates, added, 1, last))


def _attend(graph: Graph, model: DeployedModel, layer: int, x: str, gates: dict[str, str]) -> str:
    """Compute the gated outputs of a layer's heads, side by side: [B, T, D] -> [B, Q, H K]."""
    config, params = model.config, model.params["layers"][layer]
    n, last, K = _normalise(graph, model, x, params["norm1"]), layer == config.depth - 1, config.head_width
    parts = []
    for i in range(3):
        width = params["qkv"]["kernel"].shape[1] // 3
        dense = {name: value[..., i * width : (i + 1) * width] for name, value in params["qkv"].items()}
        reads = graph.slice(n, 1, 0, 1) if last and i == 0 else n
        part = graph.reshape(graph.dense(reads, dense), 0, 0, -1, K)
        parts.append(graph.add("Transpose", part, perm=[0, 2, 3, 1] if i == 1 else [0, 2, 1, 3]))
    q, k, v = parts
    scores = graph.add("Div", graph.add("MatMul", q, k), graph.constant(math.sqrt(K)))
    if "tokens" in gates:  # exp(-1e30) is 0: what is dropped has no weight
        dropped = graph.add("Sub", graph.constant(1.0), graph.reshape(gates["tokens"], 0, 1, 1, -1))
        scores = graph.add("Sub", scores, graph.times(dropped, graph.constant(1e30)))
    y = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)
    if "heads" in gates:
        g = graph.reshape(gates["heads"], 0, -1, 1, 1)
        y = graph.times(y, g)
        if config.gate is not None and config.gate.dropped == "identity":
            passed = graph.slice(v, 2, 0, 1) if last else v
            y = graph.add("Add", y, graph.times(passed, graph.add("Sub", graph.constant(1.0), g)))
    return graph.reshape(graph.add("Transpose", y, perm=[0, 2, 1, 3]), 0, 0, -1)


def _decide_gates(graph: Graph, model: DeployedModel, layer: int, x: str) -> dict[str, str]:
    """Compute a layer's gates by kind as 0 or 1; those of tokens include CLS and the registers: [B, T]."""
    config, params, gates = model.config, model.params["layers"][layer], dict[str, str]()
    first = 1 + config.model.registers
    for kind in GATE_KINDS:
        if config.gate is None or kind not in params.get("gates", {}):
            continue
        gate, settings = params["gates"][kind], config.gate.settings(kind)
        if kind == "tokens":
            reads = graph.slice(x, 1, first, first + config.patches)
            norm = params["norm1"] if config.gate.tokens.normalise else None
        else:
            reads, norm = graph.reshape(graph.slice(x, 1, 0, 1), 0, -1), gate.get("norm")
        reads = reads if norm is None else _normalise(graph, model, reads, norm)
        offset = threshold_logit(settings) if settings.threshold != 0.5 else 0.0
        m = graph.add("Sub", graph.dense(reads, gate), graph.constant(offset))
        g = graph.add("Cast", graph.add("Greater", m, graph.constant(0.0)), to=1)
        if kind == "tokens":
            pads = graph.constant([0, first, 0, 0], np.int64)
            g = graph.add("Pad", graph.reshape(g, 0, -1), pads, graph.constant(1.0))
        gates[kind] = g
    return gates


def _gate_sublayer(graph: Graph, gates: dict[str, str], added: str, sublayer: int, last: bool) -> str:
    """Gate what a sublayer adds to the first Q tokens."""
    if "sublayers" in gates:
        added = graph.times(added, graph.reshape(graph.slice(gates["sublayers"], 1, sublayer, sublayer + 1), 0, 1, 1))
    if "tokens" in gates and not last:
        added = graph.times(added, graph.reshape(gates["tokens"], 0, -1, 1))
    return added
