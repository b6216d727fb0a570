"""The precision of matrix products, which accelerators round: every product in the code names one of these two.

A TPU computes float32 products in passes of bfloat16, a GPU with TF32, and both choose their tiles by the shapes. With
such products the same image gets other gates in another program or in a batch of another size.
"""

from typing import Any

import jax

# of everything that a decision or a comparison depends on: on a TPU six passes of bfloat16, on a GPU plain float32
EXACT = jax.lax.Precision.HIGHEST


def training_precision() -> Any:
    """Return the precision of products that only train: JAX_DEFAULT_MATMUL_PRECISION, or else the device's default."""
    return jax.config.jax_default_matmul_precision or "default"  # type: ignore[attr-defined]
