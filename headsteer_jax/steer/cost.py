"""The multiply-accumulates (MACs) that steering takes besides the steered layer's own pass, per image.

Naming the class and moving the residual are not free:

- a bias of each class, or one for all, is a vector that is known beforehand: adding it takes no products;
- the class that the model predicts is known after a pass of everything from the steered layer on, which then runs
  again: the unsteered pass is extra;
- latents that are chosen or changed by their activations need the autoencoder's encoder, and the decoder rows of the
  changed ones (all of them, if the reconstruction replaces the residual);
- a guess needs its classifier, and a mixture of the classes that it considers.

Axes: G strategies, Y ways to name the class, N images.
"""

from collections.abc import Sequence

import numpy as np

from headsteer_jax.config.schema import Config
from headsteer_jax.steer.by_image import ImageStrategy
from headsteer_jax.steer.results import BY_PREDICTION, NAMED_BY
from headsteer_jax.steer.strategies import Choice, Strategy


def count_moving_macs(config: Config, classes: int, strategy: Strategy | ImageStrategy, choice: Choice) -> int:
    """Count the MACs of finding and moving along one image's direction, for alphas above 0, if its class is known.

    Args:
      classes: C.
      choice: the strategy's; of one that chooses for each image it does not matter.
    """
    width, steer = config.model.width, config.steer
    by_image = isinstance(strategy, ImageStrategy)
    if isinstance(strategy, ImageStrategy) and not strategy.reads_latents:
        mixed = min(steer.guess_classes or classes, classes)
        return (classes + mixed) * width
    if choice.directions is not None and not by_image:
        return 0
    always_the_same = steer.mode == "add" and steer.form == "delta" and not (choice.weights < 0).any()
    if always_the_same and not by_image:
        return 0
    changed = steer.latents if by_image else choice.latents.shape[1]
    decoded = changed if steer.form == "delta" else config.latents
    return (config.latents + decoded) * width


def count_extra_macs(
    moving_G: Sequence[int], class_matters_G: np.ndarray, unsteered_N: np.ndarray, steered_N: np.ndarray
) -> np.ndarray:
    """Count the MACs of an image that steering adds to the pass that steers it: [G, Y] means over images.

    Args:
      moving_G: as `count_moving_macs` counts them.
      class_matters_G: bool, whether a strategy needs to know the class.
      unsteered_N: MACs of the unsteered model from the steered layer on.
      steered_N: bool, whether an image is steered if the prediction names its class. The answer of one that is not is
        that of the unsteered pass, so that no second pass follows.
    """
    extra_GY = np.repeat(np.asarray(moving_G, np.float64)[:, None], len(NAMED_BY), axis=1)
    predicted_G = [(steered_N * (unsteered_N.astype(np.float64) + moving)).mean() for moving in moving_G]
    extra_GY[class_matters_G, BY_PREDICTION] = np.array(predicted_G)[class_matters_G]
    return extra_GY
