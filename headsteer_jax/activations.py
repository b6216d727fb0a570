"""One forward pass over a split: what the model predicts, which heads it runs, and the CLS residual of a layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.augment import preprocess
from headsteer_jax.config import Config
from headsteer_jax.data import Split, gather, prefetched
from headsteer_jax.progress import progress
from headsteer_jax.vit import Gating, ViT, stack_gates


class Observed(NamedTuple):
    """N images as the model sees them."""

    prediction: np.ndarray  # [N] int32
    gates: np.ndarray  # [N, A, H] bool, of the gated layers
    x: np.ndarray  # [N, D] float32, the CLS residual that enters the layer asked for
    gate_logits: np.ndarray  # [N, H] float32 of that layer

    def accuracy(self, labels: np.ndarray) -> float:
        return float(np.mean(self.prediction == labels))


def padded_chunks(count: int, size: int) -> list[np.ndarray]:
    """Indices of `count` images in chunks of one size, for one compiled program: the last is filled with image 0."""
    size = min(size, count)
    filled = np.zeros(-(-count // size) * size, np.int64)
    filled[:count] = np.arange(count)
    return list(filled.reshape(-1, size))


def observe(
    model: ViT, params: Any, split: Split, config: Config, gating: Gating, layer: int, what: str = "forward"
) -> Observed:
    """Run the model over a whole split, without augmentation.

    Args:
      params: the model's variables.
      gating: dense (every head) or thresholded (evaluation's gates).
      layer: whose CLS residual and gate logits are kept; a gated layer.
    """

    @jax.jit
    def forward(params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        logits_BC, out = model.apply(params, preprocess(images, config.data), gating=gating)
        prediction = jnp.argmax(logits_BC, axis=-1).astype(jnp.int32)
        return prediction, stack_gates(out["gates"]) > 0, out["cls"][layer], out["gate_logits"][layer]

    count = len(split.labels)
    chunks = padded_chunks(count, config.train.eval_batch)
    parts = []
    with progress(count, what, "image") as bar:
        for images in prefetched(lambda i: gather(split.images, chunks[i]), len(chunks)):
            parts.append(jax.device_get(forward(params, images)))
            bar.update(len(images))
    return Observed(*(np.concatenate(arrays)[:count] for arrays in zip(*parts, strict=True)))
