"""The result of a sweep: what every setting gives on the validation and the test split, as counts and bits.

Axes: G strategies, S seeds, Y ways to name the class that steers an image, A alphas, N images, C classes, H gates of
the steered layer (its heads, then attention and the MLP, as far as it gates them), F latents, L latents chosen for a
class, P gate patterns.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from headsteer_jax.steer.tally import StepFunction

NAMED_BY = ("true", "predicted")  # axis Y: an image is steered by its label, or by the unsteered model's prediction
BY_LABEL, BY_PREDICTION = range(len(NAMED_BY))


@dataclass(frozen=True)
class SplitResult:
    """One split without steering and under every setting."""

    labels: np.ndarray  # [N] int32
    count: np.ndarray  # [C] images of each class
    pattern: np.ndarray  # [N] int32 unsteered gates
    prediction: np.ndarray  # [N] int32, unsteered
    table: np.ndarray  # [N, P] int32, the prediction under each listed pattern
    unsteered_correct: np.ndarray  # [C] right answers
    unsteered_heads_on: np.ndarray  # [C, H] images on which the gate is open
    unsteered_right: np.ndarray  # [N/8] uint8 bits: is the answer right
    right: np.ndarray  # [G, S, Y, A, N/8] uint8 bits: is the answer right
    gates: np.ndarray  # [G, S, Y, A, H, N/8] uint8 bits: is the gate open
    correct: np.ndarray  # [G, S, Y, A, C] right answers
    gained: np.ndarray  # [G, S, Y, A, C] right, and wrong without steering
    lost: np.ndarray  # [G, S, Y, A, C] wrong, and right without steering
    heads_on: np.ndarray  # [G, S, Y, A, C, H] images on which the gate is open
    kept_patches: np.ndarray  # [N] int32, patches that the steered layer keeps
    unsteered_macs: np.ndarray  # [C] float64 sums of the layer's MACs, whole numbers
    macs: np.ndarray  # [G, S, Y, A, C] float64 sums of the layer's MACs, whole numbers

    @property
    def heads(self) -> int:
        """H, the gates of the steered layer that read its CLS residual."""
        return self.heads_on.shape[-1]

    @property
    def seeds(self) -> int:
        """S, the seeds of the autoencoder."""
        return self.right.shape[1]


@dataclass(frozen=True)
class SweepResult:
    """A whole sweep: what was steered how, and what it gave on both splits."""

    strategies: tuple[str, ...]  # G names
    alphas: np.ndarray  # [A] float64, ascending, with 0
    class_names: tuple[str, ...]
    gates: tuple[int, ...] | tuple[str, ...]  # H labels of the gates: numbers of heads, or names if there are others
    subset: np.ndarray  # [P] int64 gate patterns of the tables
    related: np.ndarray | None  # [C, C] bool: do two classes share a superclass; None: the dataset has none
    latents: np.ndarray  # [G, S, C, L] int32 chosen latents, filled with -1
    weights: np.ndarray  # [G, S, C, L] float32 their weights, filled with 0
    class_matters: np.ndarray  # [G] bool: does it make a difference which class steers an image
    extra_macs: np.ndarray  # [G, Y] float64 MACs of a test image besides the pass that steers it, for alphas above 0
    directions: np.ndarray | None  # [G, S, C, D] float32, 0 where latents are changed; None if all strategies do that
    push: np.ndarray | None  # [G, S, C, H] added to gate logits at alpha 1, or NaN; None: not affine in alpha
    gate_logits: np.ndarray | None  # [C, H] means over a class's training images; None as `push`
    frequency: np.ndarray  # [S, F] share of training images on which a latent fires
    class_frequency: np.ndarray  # [C, F] float32 the same by class, of the first seed
    top_images: np.ndarray  # [F, T] int32 training images that activate a latent most, of the first seed
    top_activations: np.ndarray  # [F, T] float32
    overlap_class_class: np.ndarray | None  # [S, C, C] shared latents of two classes; None without `class`
    overlap_global_class: np.ndarray | None  # [S, C] shared latents of `global` and `class`; None without one of them
    validation: SplitResult
    test: SplitResult
    # split -> strategy -> accuracy and usage as exact functions of alpha, over all seeds, steered by the label; empty
    # where alpha is not exact
    steps: Mapping[str, Mapping[str, StepFunction]]
