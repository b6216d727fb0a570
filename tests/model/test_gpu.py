"""The form of a training step for GPUs computes what the plain form does, and lowers to what it is meant to."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import environment
from scipy.special import erf

from headsteer_jax.config import Config, DataConfig, GateConfig, ModelConfig, TrainConfig
from headsteer_jax.model import gpu
from headsteer_jax.model.gates import Gates
from headsteer_jax.model.vit import Form, ViT, build_model, draw_noise, training_form

CLASSES = 5


def small_config(**model: object) -> Config:
    return Config(
        data=DataConfig(source="npz", path="x", image_size=8, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3),
        model=ModelConfig(**{"depth": 3, "width": 32, "heads": 2, "patch": 2} | model),
        gate=GateConfig(kinds=("heads", "sublayers")),
        train=TrainConfig(batch=16),
    )


def test_a_kernels_gradient_is_summed_in_parts() -> None:
    rng = np.random.default_rng(0)
    x_NI, kernel_IO, gradient_NO = (rng.normal(size=shape) for shape in ((8192, 24), (24, 40), (8192, 40)))
    assert gpu.count_parts(8192, 24, 40) == 8
    y_NO, pull = jax.vjp(
        lambda x, kernel: gpu.multiply_rows(x, kernel, "highest"),
        *(jnp.asarray(a, jnp.float32) for a in (x_NI, kernel_IO)),
    )
    x_gradient, kernel_gradient = pull(jnp.asarray(gradient_NO, jnp.float32))
    np.testing.assert_allclose(y_NO, x_NI @ kernel_IO, atol=1e-5)
    np.testing.assert_allclose(x_gradient, gradient_NO @ kernel_IO.T, atol=1e-5)
    np.testing.assert_allclose(kernel_gradient, x_NI.T @ gradient_NO, atol=2e-4)


PARTS_ON_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from headsteer_jax.compilation.hlo import summarise_program
from headsteer_jax.model.gpu import count_parts, multiply_rows
from headsteer_jax.runtime.mesh import batch_sharding, local_mesh, replicated_sharding
devices = local_mesh()
rng = np.random.default_rng(0)
shapes = (24576, 24), (24, 40), (24576, 40)
x_NI, kernel_IO, gradient_NO = (rng.normal(size=shape).astype("float32") for shape in shapes)
placed = [jax.device_put(a, batch_sharding(devices)) for a in (x_NI, gradient_NO)]
def differentiate(x_NI, kernel_IO, gradient_NO):
    return jax.vjp(lambda kernel: multiply_rows(x_NI, kernel, "highest", 8), kernel_IO)[1](gradient_NO)[0]
program = jax.jit(differentiate, out_shardings=replicated_sharding(devices))
compiled = program.lower(placed[0], kernel_IO, placed[1]).compile()
assert count_parts(24576 // 8, 24, 40) == 2
assert "f32[2,24,40]" in compiled.as_text()  # of each device
np.testing.assert_allclose(compiled(placed[0], kernel_IO, placed[1]), x_NI.T @ gradient_NO, atol=1e-3)
print(summarise_program(compiled.as_text()).collectives)
"""


def test_each_device_sums_parts_of_its_own_rows() -> None:
    """Parts of all rows together would be cut across devices, which then exchange them."""
    result = subprocess.run(
        [sys.executable, "-c", PARTS_ON_DEVICES], env=environment(8), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert eval(result.stdout) == {"all-reduce": (1.0, 24 * 40 * 4.0)}


@pytest.mark.parametrize(
    ("rows", "width", "columns", "parts"),
    [
        (66_560, 384, 1536, 8),  # 36 tiles: 288 in eight parts
        (66_560, 384, 384, 32),  # 9 tiles
        (1024, 384, 384, 1),  # parts would be too short
        (3 * 1025, 384, 384, 1),  # it cannot be halved
        (10**6, 4096, 4096, 1),  # it has enough tiles
    ],
)
def test_the_number_of_parts(rows: int, width: int, columns: int, parts: int) -> None:
    assert gpu.count_parts(rows, width, columns) == parts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_and_its_gradient(dtype: str) -> None:
    x = jnp.linspace(-6, 6, 1001).astype(dtype)
    y, pull = jax.vjp(gpu.gelu_from_input, x)
    (slope,) = pull(jnp.ones_like(x))
    exact = np.asarray(x, np.float64)
    share = 0.5 + 0.5 * erf(exact / np.sqrt(2))
    roundoff = 2e-6 if dtype == "float32" else 2**-8
    assert y.dtype == slope.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), exact * share, rtol=roundoff, atol=roundoff)
    expected = share + exact * np.exp(-(exact**2) / 2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(np.asarray(slope, np.float64), expected, rtol=roundoff, atol=roundoff)


def sampled_gradient(model: ViT, params: object, images: jax.Array, noise: Gates) -> tuple[object, jax.Array]:
    """The gradient of a loss on logits and gates, and the logits."""

    def loss(params: object) -> tuple[jax.Array, jax.Array]:
        logits, out = model.apply(params, images, gating="sampled", noise=noise)
        usage = sum(g.mean() for gates in out["gates"].values() for g in gates.values())
        return jnp.square(logits).mean() + usage, logits

    return jax.jit(jax.grad(loss, has_aux=True))(params)


@pytest.mark.parametrize(
    ("form", "kinds", "scan"),
    [
        ("gpu", ("heads", "sublayers"), False), ("gpu", ("heads", "sublayers"), True), ("gpu", ("tokens",), False),
        ("cudnn", ("heads", "sublayers"), False), ("cudnn", ("heads", "sublayers"), True),
    ],
)  # fmt: skip
def test_it_computes_what_the_plain_form_does(
    form: Form, kinds: tuple, scan: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An odd number of tokens (17), registers or not; cuDNN's kernel is replaced by XLA's of the same interface."""
    attend = gpu.attend
    monkeypatch.setattr(gpu, "attend", lambda *args: attend(*args, implementation="xla"))
    for registers in (0, 1):
        config = small_config(registers=registers, depth=5).model_copy(update={"gate": GateConfig(kinds=kinds)})
        plain = build_model(config, CLASSES).clone(scan=scan)
        images = jax.random.normal(jax.random.key(1), (16, 8, 8, 3))
        params = plain.init(jax.random.key(0), images)
        params = jax.tree.map(
            lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params
        )
        assert len(plain.apply(params, range(5), method="_layers_to_scan")) == (3 if scan else 0)
        noise = draw_noise(jax.random.key(2), plain, 16)
        found = [sampled_gradient(model, params, images, noise) for model in (plain, plain.clone(form=form))]
        (expected_gradient, expected), (gradient, logits) = found
        shapes = [model.apply(params, images, 2, method="before").shape for model in (plain, plain.clone(form=form))]
        assert shapes[0] == shapes[1]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("capability", "flags", "kinds", "dtype", "form"),
    [
        ("", "", ("heads",), "bfloat16", "plain"),
        ("9.0", "--xla_gpu_exclude_nondeterministic_ops=true", ("heads",), "bfloat16", "gpu"),
        ("9.0", "--xla_gpu_deterministic_ops", ("heads",), "bfloat16", "gpu"),
        ("9.0", "--xla_gpu_exclude_nondeterministic_ops=false", ("heads",), "bfloat16", "cudnn"),
        ("9.0", "--xla_gpu_deterministic_ops=false", ("heads", "sublayers"), "bfloat16", "cudnn"),
        ("9.0", "", ("heads",), "bfloat16", "gpu"),
        (
            "9.0",
            "--xla_gpu_deterministic_ops=false --xla_gpu_exclude_nondeterministic_ops",
            ("heads",),
            "bfloat16",
            "gpu",
        ),
        ("9.0", "--xla_gpu_deterministic_ops=false", ("heads", "tokens"), "bfloat16", "gpu"),
        ("8.0", "--xla_gpu_deterministic_ops=0", ("heads",), "bfloat16", "cudnn"),
        ("7.5", "--xla_gpu_deterministic_ops=0", ("heads",), "bfloat16", "gpu"),  # before Ampere
        ("gfx942", "--xla_gpu_deterministic_ops=0", ("heads",), "bfloat16", "gpu"),  # AMD's
        ("9.0", "--xla_gpu_deterministic_ops=0", ("heads",), "float32", "gpu"),
    ],
)
def test_the_form_of_a_training_step(
    capability: str, flags: str, kinds: tuple, dtype: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", flags)
    config = small_config(dtype=dtype).model_copy(update={"gate": GateConfig(kinds=kinds)})
    device: Any = SimpleNamespace(platform="gpu", compute_capability=capability)
    devices = [device] * 4 if capability else jax.devices()[:1]
    assert training_form(build_model(config, CLASSES), config, devices).form == form
    narrow = config.model_copy(update={"model": config.model.model_copy(update={"heads": 8})})  # cuDNN has no width 4
    assert training_form(build_model(narrow, CLASSES), narrow, devices).form == form.replace("cudnn", "gpu")


def test_cudnns_attention_is_what_a_gpu_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowered for CUDA without a GPU: forward and backward of every layer but the last are cuDNN's calls."""
    module = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91_500)
    config = small_config(dtype="bfloat16")
    model = build_model(config, CLASSES).clone(model=config.model, form="cudnn")
    images = jnp.zeros((4, 8, 8, 3))
    params = build_model(config, CLASSES).init(jax.random.key(0), images)

    def loss(params: object) -> jax.Array:
        return model.apply(params, images)[0].sum()

    text = jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == text.count("@__cudnn$fmhaSoftmaxBackward(") == 2
