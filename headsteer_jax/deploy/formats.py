"""The files of a deployed model for programs that do not know this package.

model.stablehlo is one StableHLO program, which JAX alone loads and runs, on CPUs, GPUs and TPUs. The ONNX files need
the extra `onnx`; without it they are left out.
"""

import importlib.util
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from headsteer_jax.deploy.model import DeployedModel, compute_logits
from headsteer_jax.deploy.onnx_file import export_onnx
from headsteer_jax.runtime.files import write_bytes

logger = logging.getLogger(__name__)

PLATFORMS = ("cpu", "cuda", "tpu")


def export_stablehlo(model: DeployedModel) -> bytes:
    """Export a model for any batch size: `jax.export.deserialize(content).call(images)` computes the logits [B, C].

    The weights are constants of the program. Images are uint8 [B, height, width, channels] as config.json says.
    """
    (batch,) = export.symbolic_shape("B")
    images = jax.ShapeDtypeStruct((batch, *model.config.image), np.uint8)
    params = jax.tree.map(jnp.asarray, model.params)
    function = jax.jit(lambda images: compute_logits(model.config, params, images))
    return bytes(export.export(function, platforms=PLATFORMS)(images).serialize())


def write_formats(model: DeployedModel, directory: Path) -> None:
    """Write model.stablehlo and, if the package onnx is installed, model.onnx and model_batch1.onnx.

    Raises:
      HeadSteerError: the disk is full or not writable.
    """
    write_bytes(directory / "model.stablehlo", export_stablehlo(model))
    if importlib.util.find_spec("onnx") is None:
        logger.info("deploy: model.onnx is left out, as it needs the extra onnx: pip install 'headsteer-jax[onnx]'")
        return
    write_bytes(directory / "model.onnx", export_onnx(model))
    write_bytes(directory / "model_batch1.onnx", export_onnx(model, batch=1))
