"""Sets of heads that a run's gates, steering and tables suggest, as proposals of what a smaller model keeps.

They are tried beside the sets of a least-squares criterion (`selection.py`), which decides by the loss.

Axes: N images, C classes, A layers with gates, P gate patterns, G gates, H heads.
"""

from collections.abc import Callable, Mapping

import numpy as np

from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import Split
from headsteer_jax.deploy.images import ClassImages, draw_images
from headsteer_jax.model.passes import make_observer
from headsteer_jax.model.vit import TrainedModel
from headsteer_jax.steer.gates import LayerGates, pattern_to_gates

Proposals = Callable[[int], list[np.ndarray]]  # layer -> sets of heads that may stay

GATE_IMAGES = 1000  # training images of the classes on which the run's gates are asked


def propose_open_heads(gated: TrainedModel, images: ClassImages, labels: np.ndarray, seed: int) -> Proposals:
    """Make the function that proposes, for a layer, the heads that the run's gates open most on the classes' images.

    Args:
      images: of some classes, whose labels count from 0.
      labels: [C] the same classes, as the run numbers them.
    """
    config = gated.config
    layers = config.layers_with("heads")
    if not layers:
        return lambda layer: []
    pixels, of_class = draw_images(images.train, GATE_IMAGES, seed)
    drawn = Split(pixels, labels[of_class])
    observed = make_observer(gated.model, config, "thresholded", config.sae_layer)(
        gated.params, drawn, "deploy: the gates' heads"
    )
    usage_AH = observed.gates["heads"].mean(axis=0)
    return lambda layer: _take_most(usage_AH[layer - layers.start]) if layer in layers else []


def propose_swept_heads(config: Config, arrays: Mapping[str, np.ndarray], labels: np.ndarray) -> Proposals:
    """Make the function that proposes heads of the steered layer by what the run's stage steer found on validation.

    For some classes these are, of each size, the subset with the most right answers in the table of all patterns, and
    for each strategy the heads that it leaves open most, at its chosen strength.

    Args:
      arrays: those of sweep.nc.
      labels: of the classes.
    """
    gates = LayerGates(config, config.sae_layer)
    if not gates.heads:
        return lambda layer: []
    proposals = _find_best_subsets(gates, arrays, labels) if gates.fits_table else []
    heads_on = arrays["validation_heads_on"][:, 0, 0][:, :, labels, : gates.heads].sum(axis=2)  # [S, alphas, H]
    for strategy, alpha in enumerate(arrays["chosen"][:, 0]):
        proposals += _take_most(heads_on[strategy, alpha])
    return lambda layer: proposals if layer == config.sae_layer else []


def join_proposals(*sources: Proposals) -> Proposals:
    """Join what several functions propose, each set of heads once."""
    return lambda layer: list({tuple(stay): stay for propose in sources for stay in propose(layer)}.values())


def _take_most(usage_H: np.ndarray) -> list[np.ndarray]:
    """Take of each size the heads with the highest usage."""
    order = np.argsort(-usage_H, kind="stable")
    return [np.sort(order[:count]) for count in range(1, len(order))]


def _find_best_subsets(gates: LayerGates, arrays: Mapping[str, np.ndarray], labels: np.ndarray) -> list[np.ndarray]:
    """Find of each size the heads with which most of the classes' validation images are answered right."""
    open_PG = pattern_to_gates(arrays["subset"], gates.count)
    members = np.isin(arrays["validation_labels"], labels)
    right_P = np.sum(arrays["validation_table"][members] == arrays["validation_labels"][members, None], axis=0)
    found = []
    for size in range(1, gates.heads):
        fits_P = open_PG[:, gates.heads :].all(axis=1) & (open_PG[:, : gates.heads].sum(axis=1) == size)
        best = np.flatnonzero(fits_P)[np.argmax(right_P[fits_P])]
        found.append(np.flatnonzero(open_PG[best, : gates.heads]))
    return found
