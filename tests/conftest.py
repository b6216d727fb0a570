"""Small data and a finished run, made once for all tests that need them, and the compilation cache that they share."""

import atexit
import os
import shutil
import tempfile

# The tests' bounds are those of float32. A GPU rounds the operands of products to TF32 unless it is told otherwise, and
# the first process takes most of its memory. Both must be set before JAX is imported.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# Tests and the processes that they start share compiled programs. This must be set before JAX is imported.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the worker processes share their parent's
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="headsteer-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import numpy as np
import pytest
from builders import CLASSES
from helpers import FinishedRun, make_finished_run

from headsteer_jax.data.dataset import Split


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run of every stage but grid on a tiny config, which all worker processes share; tests must not change it."""
    directory = tmp_path_factory.getbasetemp()
    return make_finished_run(directory.parent if "PYTEST_XDIST_WORKER" in os.environ else directory)


@pytest.fixture(scope="session")
def split() -> Split:
    """Make 90 images of 8x8 pixels in CLASSES classes."""
    rng = np.random.default_rng(3)
    return Split(rng.integers(0, 256, (90, 8, 8, 1), dtype=np.uint8), (np.arange(90) % CLASSES).astype(np.int32))


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """Make normalised images [5, 8, 8, 1]."""
    return np.random.default_rng(7).standard_normal((5, 8, 8, 1)).astype(np.float32)
