"""The images of some classes, and what a deployed model answers on them.

Axes: B images, C classes, D width.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np

from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import Dataset, Split, gather_images
from headsteer_jax.deploy.model import DeployedConfig, DeployedModel, Params, compute_gates, compute_logits_and_cls
from headsteer_jax.model.vit import predict_class
from headsteer_jax.runtime.progress import progress

BATCH = 250


class ClassImages(NamedTuple):
    """The splits of a dataset with the images of some classes only, whose labels count from 0."""

    train: Split
    validation: Split
    test: Split


def select_images(dataset: Dataset, labels: np.ndarray) -> ClassImages:
    """Select the images of some classes [C]; an image of labels[i] gets the label i."""
    places = np.full(len(dataset.class_names), -1, np.int32)
    places[labels] = np.arange(len(labels))

    def select(split: Split) -> Split:
        members = np.flatnonzero(places[split.labels] >= 0)
        return Split(split.images[members], places[split.labels[members]])

    return ClassImages(select(dataset.train), select(dataset.validation), select(dataset.test))


def draw_images(split: Split, most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw at most so many images of a split, as many of each class as of any other.

    Returns:
      [n, h, w, C] uint8, and their labels [n].
    """
    rng, order = np.random.default_rng([seed, 8]), np.zeros(len(split.labels))
    for label in np.unique(split.labels):
        members = np.flatnonzero(split.labels == label)
        order[rng.permutation(members)] = np.arange(len(members))
    drawn = np.argsort(order, kind="stable")[:most]
    return gather_images(split.images, drawn), split.labels[drawn]


class Answers(NamedTuple):
    """The answers of a model on the images of a split."""

    prediction: np.ndarray  # [B] int32
    cls: np.ndarray  # [B, D] the CLS residual after the last layer
    right: np.ndarray  # [B] bool

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return float(np.mean(self.right))


def answer_images(model: DeployedModel, split: Split, label: str) -> Answers:
    """Run a model on a split; `label` is the name of the work in the progress."""
    count, params = len(split.labels), jax.device_put(model.params)
    size, parts, right = min(BATCH, count), [], 0
    with progress(count, label, "image") as bar:
        for begin in range(0, count, size):
            places = np.minimum(np.arange(begin, begin + size), count - 1)  # one shape, so that there is one program
            parts.append(jax.device_get(_answer(model.config, params, gather_images(split.images, places))))
            right += int(np.sum(parts[-1][0][: count - begin] == split.labels[begin : begin + size]))
            done = min(begin + size, count)
            bar.update(done - begin, f"accuracy {right / done:.1%}")
    prediction, cls = (np.concatenate(arrays)[:count] for arrays in zip(*parts, strict=True))
    return Answers(prediction, cls, prediction == split.labels)


def collect_gates(model: DeployedModel, split: Split) -> dict[str, np.ndarray]:
    """Collect the gates of a dynamic model on a split, by kind [N, A, n] bool of the layers that have it."""
    count, parts = len(split.labels), []
    size = min(BATCH, count)
    for begin in range(0, count, size):
        places = np.minimum(np.arange(begin, begin + size), count - 1)
        parts.append(jax.device_get(_run_gates(model.config, model.params, gather_images(split.images, places))))
    return {kind: np.concatenate([part[kind] for part in parts])[:count] > 0 for kind in parts[0]}


_run_gates = jax.jit(
    lambda config, params, images: compute_gates(config, params, preprocess(images, config.data)), static_argnums=0
)


@functools.partial(jax.jit, static_argnums=0)
def _answer(config: DeployedConfig, params: Params, images_BhwC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute the predicted classes [B] and the last CLS residuals [B, D]."""
    logits_BC, cls_BD = compute_logits_and_cls(config, params, preprocess(images_BhwC, config.data))
    return predict_class(logits_BC), cls_BD
