"""JAX's process-wide settings: the user's do not reach our computation, and come back after it."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest
from helpers import FinishedRun
from jax import experimental

from headsteer_jax import HeadSteerError, load_run
from headsteer_jax.runtime import settings as own_settings
from headsteer_jax.runtime.settings import (
    JAX_DEFAULTS,
    open_devices,
    request_determinism,
    use_own_settings,
    use_own_settings_in_thread,
)

HOSTILE = {
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_random_seed_offset": 5,
    "jax_debug_key_reuse": True,
    "jax_transfer_guard_host_to_device": "disallow",
    "jax_transfer_guard_device_to_host": "disallow",
}


def seen() -> dict[str, Any]:
    """Return the settings that this thread sees; no guard of transfers is one that allows them."""
    settings = {name: getattr(jax.config, name) for name in JAX_DEFAULTS}
    return {name: value or ("allow" if "guard" in name else value) for name, value in settings.items()}


@pytest.fixture
def hostile() -> Iterator[dict[str, Any]]:
    """Give the process the settings that a user may have."""
    before = seen()
    for name, value in HOSTILE.items():
        jax.config.update(name, value)
    try:
        yield JAX_DEFAULTS | HOSTILE
    finally:
        for name in HOSTILE:
            jax.config.update(name, before[name])


def test_own_settings_are_those_of_a_fresh_jax() -> None:
    assert seen() == JAX_DEFAULTS


def test_own_settings_count_in_every_thread_and_the_users_come_back(hostile: dict[str, Any]) -> None:
    enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else experimental.enable_x64  # in JAX 0.7
    with enable_x64(False), jax.numpy_dtype_promotion("strict"), ThreadPoolExecutor(1) as worker:
        with use_own_settings():
            assert seen() == JAX_DEFAULTS
            assert worker.submit(seen).result() == JAX_DEFAULTS
        assert seen() == hostile | {"jax_enable_x64": False}
        assert worker.submit(seen).result() == hostile
    assert seen() == hostile


def test_they_come_back_after_an_error(hostile: dict[str, Any]) -> None:
    with pytest.raises(KeyError), use_own_settings():
        raise KeyError
    assert seen() == hostile


def test_in_one_thread_they_leave_the_others_alone(hostile: dict[str, Any]) -> None:
    with use_own_settings_in_thread(), ThreadPoolExecutor(1) as worker:
        assert jax.random.key(3).dtype == jax.random.key(3, impl="threefry2x32").dtype
        assert not jax.config.jax_enable_x64
        assert worker.submit(seen).result() == hostile


def test_a_loaded_run_computes_the_same_in_a_process_of_other_settings(finished: FinishedRun) -> None:
    """Bit for bit: the sweep, exact alphas and latents, also from residuals in 64 bits."""
    before = seen()
    results = []
    for settings in ({}, HOSTILE):
        for name, value in settings.items():
            jax.config.update(name, value)
        try:
            run = load_run(finished.workdir)
            x = run.x_train[:8]
            codes = run.autoencoder(0).encode(x.astype(np.float64) if settings else x)
            again = run.autoencoder(0).reconstruct(x)
            results.append((run.sweep(["class"], alphas=(1.0,)), run.exact("class"), codes, again))
        finally:
            for name in settings:
                jax.config.update(name, before[name])
    (sweep, exact, codes, again), (hostile_sweep, hostile_exact, hostile_codes, hostile_again) = results
    assert sweep.identical(hostile_sweep)
    for field, other in zip(exact, hostile_exact, strict=True):
        np.testing.assert_array_equal(field, other)
    np.testing.assert_array_equal(codes, hostile_codes)
    np.testing.assert_array_equal(again, hostile_again)


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize\n backend 'cuda'"), AssertionError()])
def test_a_device_that_cannot_be_opened(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def devices() -> None:
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr("headsteer_jax.runtime.settings.read_platforms", lambda: "cuda")
    with pytest.raises(HeadSteerError, match=r"JAX_PLATFORMS=cuda: no device could be opened .*; unset it") as caught:
        open_devices()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("plugin", "before", "after"),
    [
        (None, "", None),
        ("jax_cuda13_plugin", None, "--xla_gpu_exclude_nondeterministic_ops=true"),
        ("jax_cuda12_plugin", "--xla_dump_to=x", "--xla_dump_to=x --xla_gpu_exclude_nondeterministic_ops=true"),
        ("jax_cuda13_plugin", "--xla_gpu_deterministic_ops=false", "--xla_gpu_deterministic_ops=false"),
        ("jax_cuda13_plugin", *["--xla_gpu_exclude_nondeterministic_ops=false"] * 2),
    ],
)
def test_gpus_are_asked_for_the_same_bits_unless_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch, plugin: str | None, before: str | None, after: str | None
) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if before:
        monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.setattr(own_settings.importlib.util, "find_spec", lambda name: name == plugin or None)  # type: ignore[attr-defined]
    request_determinism()
    assert os.environ.get("XLA_FLAGS") == after
