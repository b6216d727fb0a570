"""Sparse codes against dense products in float64, and against the XLA functions that they replace."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, environment
from hypothesis import given, settings
from hypothesis import strategies as st

from headsteer_jax.sae import sparse

needs_compiler = pytest.mark.skipif(not sparse.is_available(), reason="needs a CPU and a C++ compiler")


def drawn(seed: int, B: int, F: int, D: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, rows and biases; rounded, so that activations tie."""
    rng = np.random.default_rng(seed)
    u, W, bias = rng.standard_normal((B, D)), rng.standard_normal((F, D)), rng.standard_normal(F)
    return tuple(np.round(a * 2).astype(np.float32) / 2 for a in (u, W, bias))  # type: ignore[return-value]


def dense(values: np.ndarray, latents: np.ndarray, F: int) -> np.ndarray:
    z = np.zeros((len(values), F))
    for row, value, latent in zip(z, np.asarray(values, np.float64), latents, strict=True):
        np.add.at(row, latent, value)
    return z


@needs_compiler
@given(st.integers(0, 10**6), st.integers(1, 70), st.integers(1, 600), st.integers(1, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_encode_is_top_k_with_ties_and_odd_shapes(seed: int, B: int, F: int, D: int, data: st.DataObject) -> None:
    max_k = data.draw(st.integers(1, F))
    k = data.draw(st.integers(0, max_k))
    u, W, bias = drawn(seed, B, F, D)
    values, latents = jax.jit(sparse.encode_top_k, static_argnums=4)(u, W, bias, jnp.int32(k), max_k)
    a = np.maximum(u.astype(np.float64) @ W.T + bias, 0)
    order = np.argsort(-a, axis=1, kind="stable")[:, :max_k]  # of equal values the first, as in lax.top_k
    best = np.take_along_axis(a, order, axis=1)
    best[:, k:] = 0
    np.testing.assert_array_equal(values, best)  # these halves are exact in float32
    assert np.array_equal(np.where(best > 0, latents, 0), np.where(best > 0, order, 0))


@needs_compiler
@given(st.integers(0, 10**6), st.integers(1, 50), st.integers(1, 80), st.integers(1, 33), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_products_and_gradients_are_those_of_dense_latents(seed: int, B: int, F: int, D: int, k: int) -> None:
    max_k = min(k, F)
    rng = np.random.default_rng(seed)
    u, W, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((B, D), (F, D), (F,)))
    V, target = (rng.standard_normal(shape).astype(np.float32) for shape in ((F, D), (B, D)))

    def error(u, W, bias, V):  # type: ignore[no-untyped-def]
        z, latents = sparse.encode_top_k(u, W, bias, jnp.int32(max_k), max_k)
        return jnp.sum((sparse.sum_weighted_rows(z, latents, V) - target) ** 2), (z, latents)

    (value, (z, latents)), grads = jax.jit(jax.value_and_grad(error, argnums=(0, 1, 2, 3), has_aux=True))(u, W, bias, V)
    # in float64, by hand: z = ReLU(u W^T + bias) on the chosen places, e = z V - target
    z_BF = dense(z, np.asarray(latents), F)
    e = z_BF @ V.astype(np.float64) - target
    g = 2 * e @ V.T.astype(np.float64) * (z_BF > 0)
    expected = (g @ W, g.T @ u, g.sum(axis=0), 2 * z_BF.T @ e)
    np.testing.assert_allclose(value, np.sum(e**2), rtol=1e-5)
    for actual, desired in zip(grads, expected, strict=True):
        np.testing.assert_allclose(actual, desired, atol=2e-6 * (1 + np.abs(desired).max()) * np.sqrt(B * D), rtol=1e-5)
    np.testing.assert_array_equal(sparse.count_firings(z, latents, F), (z_BF > 0).sum(axis=0))


@needs_compiler
def test_vmap_is_one_member_after_another() -> None:
    rng = np.random.default_rng(0)
    W = np.round(rng.standard_normal((3, 200, 16)) * 4).astype(np.float32)  # sums of small integers are exact
    u, bias = (np.round(rng.standard_normal(shape) * 4).astype(np.float32) for shape in ((33, 16), (3, 200)))
    k = jnp.array([1, 5, 7], jnp.int32)

    def compute(W, bias, k):  # type: ignore[no-untyped-def]
        z, latents = sparse.encode_top_k(u, W, bias, k, 7)
        return (
            z,
            latents,
            sparse.sum_weighted_rows(z, latents, W),
            sparse.sum_outer_products(z, latents, jnp.asarray(u), 200),
        )

    together = jax.jit(jax.vmap(compute))(W, bias, k)
    for member in range(3):
        alone = jax.jit(compute)(W[member], bias[member], k[member])
        for array, arrays in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_array_equal(array, arrays[member])


@needs_compiler
def test_bits_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    program = """
import sys, jax, jax.numpy as jnp, numpy as np
from headsteer_jax.sae import sparse
assert sparse.is_available()
rng = np.random.default_rng(0)
u, W = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((300, 48), (700, 48)))
z, latents = jax.lax.top_k(jnp.asarray(rng.random((300, 700)), jnp.float32), 9)
np.savez(sys.argv[1], s=sparse.sum_weighted_rows(z, latents, W), o=sparse.sum_outer_products(z, latents, u, 700)[0],
         d=jax.grad(lambda z: (sparse.sum_weighted_rows(z, latents, W) * u).sum())(z))
"""
    results = []
    for cores in ("0", "0,1"):
        if len(os.sched_getaffinity(0)) < 2:
            pytest.skip("needs two cores")
        path = tmp_path / f"{cores[-1]}.npz"
        subprocess.run(
            ["taskset", "-c", cores, sys.executable, "-c", program, str(path)], check=True, cwd=ROOT,
            env=environment(),
        )  # fmt: skip
        with np.load(path) as arrays:
            results.append(dict(arrays))
    for name, values in results[0].items():
        np.testing.assert_array_equal(values, results[1][name])


@pytest.mark.parametrize(("compiler", "says"), [("/bin/false", "did not compile"), ("/no/such/c++", "did not compile")])
def test_without_a_compiler_one_line_and_dense_products(tmp_path: Path, compiler: str, says: str) -> None:
    program = """
from headsteer_jax.runtime.progress import show_log
from headsteer_jax.sae import sparse
show_log()
print(sparse.is_available())
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT,
        env=environment(CXX=compiler, XDG_CACHE_HOME=str(tmp_path)), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.strip() == "False"
    assert len(result.stderr.strip().splitlines()) == 1
    assert says in result.stderr
    assert not list(tmp_path.rglob("*.so"))
