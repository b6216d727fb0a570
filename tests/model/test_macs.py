"""Multiply-accumulates against XLA's own count of models with parts removed, and the share of a peak."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import tiny_config

from headsteer_jax.config import Config, DataConfig, GateConfig, MachineConfig, ModelConfig
from headsteer_jax.config.schema import GateKind
from headsteer_jax.model.macs import (
    PARTS,
    PEAKS,
    count_dense_macs,
    count_layer_macs,
    count_macs,
    count_open_macs,
    peak_tflops,
    training_flops,
    training_speed,
)
from headsteer_jax.model.vit import build_model
from headsteer_jax.runtime.mesh import training_mesh


def config(patch: int, **fields: object) -> Config:
    data = DataConfig(image_size=32, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    return Config(data=data, model=ModelConfig(depth=3, width=192, heads=3, patch=patch, **fields))  # type: ignore[arg-type]


def count_flops(function: Callable[..., Any], *shapes: Any) -> float:
    """Let XLA's compiler for CPUs count: on a GPU it counted 0.815 of `training_flops`."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(("patch", "registers"), [(8, 0), (4, 0), (8, 4)])
def test_forward_flops_are_xlas(patch: int, registers: int) -> None:
    """XLA counts the element-wise work as well: a few per cent."""
    c = config(patch, registers=registers)
    model = build_model(c, 100)
    images = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    counted = count_flops(lambda p, x: model.apply(p, x)[0], params, images) / 8
    assert 1.0 < counted / (2 * count_open_macs(c, 100)) < 1.06


@pytest.mark.parametrize("taught", [False, True])
def test_training_flops_are_xlas(taught: bool) -> None:
    c = config(8)
    model = build_model(c, 100)
    images = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))

    def loss(p: Any, teacher: Any, x: jax.Array) -> jax.Array:
        logits = model.apply(p, x)[0]
        return (logits * model.apply(teacher, x, gating="dense")[0] if taught else logits).sum()

    counted = count_flops(jax.grad(loss), params, params, images) / 8
    # three times the forward pass, but for the first layer's: no gradient by the image is needed
    assert 0.95 < counted / training_flops(c, 100, taught=taught) < 1.06


def test_by_hand() -> None:
    """ViT-S at 17 tokens, layer by layer."""
    c = Config(data=DataConfig(image_size=32, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3),
               model=ModelConfig.of_size("S", patch=8))  # fmt: skip
    T, D = 17, 384
    whole = 2 * (4 * T * D * D + 2 * T * T * D + 8 * T * D * D)
    last = 2 * (2 * D * D + 2 * T * D * D + 2 * T * D + 8 * D * D)
    assert 2 * count_open_macs(c, 100) == 11 * whole + last + 2 * (16 * 192 * D + 11 * 6 * D + 100 * D)


class Removed:
    """A model of one image from which closed parts are really removed: matrices are cut, dropped tokens left out.

    It is written anew, from matrices alone; its element-wise work is left out, which XLA would count as well.
    """

    def __init__(self, config: Config, gates: dict[int, dict[str, np.ndarray]]) -> None:
        self.config, self.gates = config, gates
        self.size = config.model.width // config.model.heads  # of a head

    def attention(self, x: jax.Array, rows: int, heads: list[int], weight: Any) -> jax.Array:
        """Attend with the kept tokens `x`, of which the first `rows` are queries."""
        m, dropped = self.config.model, self.config.gate.dropped
        outputs = []
        for head in range(m.heads):
            value = weight(m.width, self.size)
            if head in heads:
                query, key = weight(m.width, self.size), weight(m.width, self.size)
                outputs.append((x[:rows] @ query) @ (x @ key).T @ (x @ value))
            elif dropped == "identity":
                outputs.append(x[:rows] @ value)
        if not outputs:
            return jnp.zeros((rows, m.width))
        joined = jnp.concatenate(outputs, axis=1)
        return joined @ weight(joined.shape[1], m.width)

    def run(self, pixels: jax.Array, weights: jax.Array) -> jax.Array:
        """Compute the logits; every matrix is another cut of `weights`, so that no product is computed twice."""
        m, gate = self.config.model, self.config.gate

        offset = itertools.count()

        def weight(rows: int, columns: int) -> jax.Array:
            return weights[next(offset) :][:rows, :columns]

        x = jnp.concatenate([jnp.zeros((1 + m.registers, m.width)), pixels @ weight(pixels.shape[1], m.width)])
        hidden = round(m.mlp_ratio * m.width)
        decisions = []
        for layer in range(m.depth):
            own = self.gates.get(layer, {})
            for kind in gate.kinds_in(layer):
                reads = x[1 + m.registers :] if kind == "tokens" else x[:1]
                decisions.append((reads @ weight(m.width, 1 if kind == "tokens" else own[kind].size)).ravel())
            tokens = np.flatnonzero(own["tokens"]) if "tokens" in own else np.arange(len(x) - 1 - m.registers)
            kept = np.concatenate([np.arange(1 + m.registers), 1 + m.registers + tokens])
            heads = np.flatnonzero(own["heads"]).tolist() if "heads" in own else list(range(m.heads))
            attends, thinks = own.get("sublayers", (True, True))
            rows = 1 if layer == m.depth - 1 else len(kept)
            y = x[kept]
            changed = y[:rows]
            if attends:
                changed = self.attention(y, rows, heads, weight)
            if thinks:
                inputs = len(heads) * self.size if gate.dropped == "slice" else m.width
                changed = (changed[:, :inputs] @ weight(inputs, hidden)) @ weight(hidden, m.width)
            x = x.at[kept[:rows]].set(changed)
        return jnp.concatenate([(x[:1] @ weight(m.width, 100)).ravel(), *decisions])


def random_gates(config: Config, seed: int) -> dict[int, dict[str, np.ndarray]]:
    """Draw the gates of an image, each kind with a probability of its own in every layer."""
    rng = np.random.default_rng(seed)
    parts = {"heads": config.model.heads, "sublayers": 2, "tokens": (config.data.image_size // config.model.patch) ** 2}
    return {
        layer: {kind: rng.random(parts[kind]) < rng.choice([0.2, 0.5, 0.9]) for kind in config.gate.kinds_in(layer)}
        for layer in range(config.model.depth)
        if config.gate.kinds_in(layer)
    }


@pytest.mark.parametrize("dropped", ["zero", "identity", "slice"])
@pytest.mark.parametrize("kinds", [("heads",), ("sublayers", "tokens"), ("heads", "sublayers", "tokens")])
def test_macs_are_xlas_of_a_model_with_the_parts_removed(kinds: tuple[GateKind, ...], dropped: str) -> None:
    """Eight random sets of gates each; XLA counts two FLOPs for a MAC, and less than 1% of other work."""
    c = config(4, registers=2)
    c = c.model_copy(update={"gate": GateConfig(kinds=kinds, dropped=dropped)})  # type: ignore[arg-type]
    pixels = jax.ShapeDtypeStruct((64, 48), jnp.float32)
    weights = jax.ShapeDtypeStruct((900, 768), jnp.float32)
    seen = []
    for seed in range(8):
        gates = random_gates(c, seed)
        counted = jax.jit(Removed(c, gates).run).lower(pixels, weights).cost_analysis()["flops"] / 2
        own = {layer: {kind: g[None] for kind, g in by_kind.items()} for layer, by_kind in gates.items()}
        seen.append(float(count_macs(c, 100, own)[0]))
        assert seen[-1] == pytest.approx(counted, rel=0.01)
    assert min(seen) < 0.9 * count_dense_macs(c, 100)


def test_macs_are_those_of_xlas_compiled_program() -> None:
    c = config(4).model_copy(update={"gate": GateConfig(kinds=("heads", "sublayers", "tokens"))})
    gates = random_gates(c, 3)
    shapes = jax.ShapeDtypeStruct((64, 48), jnp.float32), jax.ShapeDtypeStruct((900, 768), jnp.float32)
    own = {layer: {kind: g[None] for kind, g in by_kind.items()} for layer, by_kind in gates.items()}
    assert float(count_macs(c, 100, own)[0]) == pytest.approx(count_flops(Removed(c, gates).run, *shapes) / 2, rel=0.01)


def test_closed_gates_leave_what_they_must() -> None:
    """A block with no heads still has its MLP; the quadratic part goes by the square of the kept tokens."""
    c = config(4).model_copy(update={"gate": GateConfig(kinds=("heads", "sublayers", "tokens"))})
    D, T = 192, 65
    ones = {"heads": jnp.ones((1, 3)), "sublayers": jnp.ones((1, 2)), "tokens": jnp.ones((1, 64))}

    def parts(**gates: jax.Array) -> dict[str, float]:
        row = count_layer_macs(c, {1: ones | gates})[0, 1]
        return dict(zip(PARTS, row.tolist(), strict=True))

    decisions = 3 * D + 2 * D + 64 * D
    full = {"projections": 3 * T * D * D, "attention": 2 * T * T * D, "output": T * D * D, "mlp": 8 * T * D * D}
    assert parts() == full | {"gates": decisions}
    none = {"projections": 0, "attention": 0, "output": 0}
    assert parts(heads=jnp.zeros((1, 3))) == full | none | {"gates": decisions}
    assert parts(sublayers=jnp.array([[0.0, 1.0]])) == full | none | {"gates": decisions}
    assert parts(sublayers=jnp.array([[1.0, 0.0]])) == full | {"mlp": 0, "gates": decisions}
    half = parts(tokens=jnp.ones((1, 64)).at[:, ::2].set(0))
    assert half["attention"] == 2 * 33 * 33 * D
    assert half["mlp"] == 8 * 33 * D * D
    assert half["gates"] == decisions


def test_macs_of_open_gates_are_the_dense_models_and_the_decisions() -> None:
    c = config(4, registers=1).model_copy(update={"gate": GateConfig(kinds=("heads", "sublayers", "tokens"))})
    opened = {layer: {"tokens": jnp.ones((2, 3, 64))} for layer in range(3)}
    np.testing.assert_allclose(count_macs(c, 100, opened), count_open_macs(c, 100), rtol=1e-6)
    assert count_macs(c, 100, opened).shape == (2, 3)
    decisions = 192 * (2 * 3 + 2 * 2 + 3 * 64)  # two layers decide heads and sublayers, three tokens
    assert count_open_macs(c, 100) - count_dense_macs(c, 100) == decisions


def test_macs_are_differentiable() -> None:
    """A head's slope in layer 1 is what it costs: projections, both products, output."""
    c = config(4)
    slope = jax.grad(lambda g: count_macs(c, 100, {1: {"heads": g}})[0])(jnp.ones((1, 3)))
    np.testing.assert_allclose(slope, 4 * 65 * 192 * 64 + 2 * 65 * 65 * 64, rtol=1e-6)


def test_speed() -> None:
    c = tiny_config()
    flops = training_flops(c, 100)
    found, tflops = training_speed(c, flops, 1000.0, training_mesh(c.machine)), 1000 * flops / 1e12
    peak = peak_tflops(c, jax.devices()[0])  # None on a CPU
    assert found == {"images_per_second": 1000.0, "tflops_per_device": pytest.approx(tflops)} | (
        {"mfu": pytest.approx(tflops / peak)} if peak else {}
    )
    c = c.model_copy(update={"machine": MachineConfig(peak_tflops=0.5)})
    assert training_speed(c, flops, 1000.0, training_mesh(c.machine))["mfu"] == pytest.approx(
        found["tflops_per_device"] / 0.5
    )


@pytest.mark.parametrize(
    ("kind", "platform", "dtype", "peak"),
    [
        ("TPU v5 lite", "tpu", "float32", 197),
        ("TPU v5p", "tpu", "bfloat16", 459),
        ("TPU v6 lite", "tpu", "bfloat16", 918),
        ("NVIDIA H100 80GB HBM3", "gpu", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "gpu", "bfloat16", 756),
        ("NVIDIA GH200 480GB", "gpu", "bfloat16", 989),
        ("NVIDIA B200", "gpu", "bfloat16", 2250),
        ("NVIDIA L4", "gpu", "bfloat16", 121),
        ("NVIDIA L40S", "gpu", "bfloat16", 362),
        ("NVIDIA L40", "gpu", "bfloat16", None),
        ("NVIDIA A10", "gpu", "float32", 62.5),
        ("NVIDIA A10G", "gpu", "bfloat16", None),
        ("TPU v5", "tpu", "bfloat16", 459),
        ("TPU7x", "tpu", "bfloat16", 1153.5),
        ("NVIDIA A100-SXM4-40GB", "gpu", "float32", 156),
        ("cpu", "cpu", "float32", None),
    ],
)
def test_peaks(kind: str, platform: str, dtype: str, peak: float | None) -> None:
    class Device:
        device_kind = kind

    Device.platform = platform  # type: ignore[attr-defined]
    c = Config(model=ModelConfig(dtype=dtype))  # type: ignore[arg-type]
    assert peak_tflops(c, Device()) == peak  # type: ignore[arg-type]
    assert len(PEAKS) == len(set(PEAKS))
