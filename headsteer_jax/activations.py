"""One forward pass over a split: what the model predicts, which heads it runs, and the CLS residual of a layer."""

import functools
from collections.abc import Callable
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


Observe = Callable[[Any, Split, str], Observed]


def padded_chunks(count: int, size: int) -> list[np.ndarray]:
    """Indices of `count` images in chunks of one size, for one compiled program: the last is filled with image 0."""
    size = min(size, count)
    filled = np.zeros(-(-count // size) * size, np.int64)
    filled[:count] = np.arange(count)
    return list(filled.reshape(-1, size))


def over_split(
    function: Callable[..., tuple[jax.Array, ...]], split: Split, size: int, what: str, *, with_labels: bool = False
) -> list[np.ndarray]:
    """What a jitted function of images [B, height, width, channels] uint8 gives for a whole split, chunk by chunk.

    Args:
      function: returns arrays whose first axis is B.
      size: B, images in a call.
      what: names the work in the progress.
      with_labels: the function takes the images' labels [B] too.

    Returns:
      The arrays, with first axis N.
    """
    count = len(split.labels)
    chunks = padded_chunks(count, size)
    parts = []
    with progress(count, what, "image") as bar:
        for i, images in enumerate(prefetched(lambda i: gather(split.images, chunks[i]), len(chunks))):
            labels = (split.labels[chunks[i]],) if with_labels else ()
            parts.append(jax.device_get(function(images, *labels)))
            bar.update(min(len(images), count - bar.done))
    return [np.concatenate(arrays)[:count] for arrays in zip(*parts, strict=True)]


def observer(model: ViT, config: Config, gating: Gating, layer: int) -> Observe:
    """`(params, split, what) -> Observed`: runs the model over a whole split, without augmentation.

    It is made once and called often, so that the forward pass is compiled once. `what` names the work in the progress.

    Args:
      gating: dense (every head) or thresholded (evaluation's gates).
      layer: whose CLS residual and gate logits are kept; a gated layer.
    """

    @jax.jit
    def forward(params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        logits_BC, out = model.apply(params, preprocess(images, config.data), gating=gating)
        prediction = jnp.argmax(logits_BC, axis=-1).astype(jnp.int32)
        return prediction, stack_gates(out["gates"]) > 0, out["cls"][layer], out["gate_logits"][layer]

    def observe(params: Any, split: Split, what: str) -> Observed:
        return Observed(*over_split(functools.partial(forward, params), split, config.train.eval_batch, what))

    return observe
