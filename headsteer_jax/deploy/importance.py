"""The order in which a sublayer can spare its features: its heads or its MLP neurons.

A feature's price is how much the sublayer's output changes, in the least-squares sense, if it goes and the others take
over what they can: the optimal brain surgeon's price (Hassibi & Stork 1993; of groups, as in ZipLM, arXiv:2302.04089).
After each removal the prices of the others are computed anew.

Axes: F features, D width, G groups (heads, or single neurons), K features of a group.
"""

import numpy as np

from headsteer_jax.deploy.calibration import Moments

DAMPING = 1e-3  # of the features' mean variance: unused features have no variance of their own


def order_removals(moments: Moments, kernel_FD: np.ndarray, group: int, step: int) -> np.ndarray:
    """Order the groups of a sublayer's features from the first that can go to the last.

    Args:
      kernel_FD: the weights of the output projection.
      group: K, the features of a group, which lie side by side.
      step: the number of groups that are removed between two computations of the prices.

    Returns:
      [G] the groups.
    """
    covariance = moments.covariance()
    damped = covariance + DAMPING * max(np.trace(covariance) / len(covariance), 1e-12) * np.eye(len(covariance))
    inverse, weights = np.linalg.inv(damped), np.asarray(kernel_FD, np.float64).copy()
    remaining, order = np.arange(len(weights) // group), list[int]()
    while len(remaining):
        prices = _price_groups(inverse, weights, group)
        going = np.argsort(prices, kind="stable")[:step]
        order.extend(remaining[going].tolist())
        places = (going[:, None] * group + np.arange(group)).reshape(-1)
        stay = np.setdiff1d(np.arange(len(weights)), places)
        carried = np.linalg.solve(inverse[np.ix_(places, places)], inverse[places][:, stay])
        weights = weights[stay] - carried.T @ weights[places]
        inverse = inverse[np.ix_(stay, stay)] - inverse[np.ix_(stay, places)] @ carried
        remaining = np.delete(remaining, going)
    return np.array(order)


def _price_groups(inverse: np.ndarray, weights: np.ndarray, group: int) -> np.ndarray:
    """Compute the price of every group that is left, if it alone goes: trace(W^T (inverse of its block)^-1 W)."""
    if group == 1:
        return np.sum(weights**2, axis=1) / np.diagonal(inverse)
    count = len(weights) // group
    blocks = inverse.reshape(count, group, count, group)[np.arange(count), :, np.arange(count)]
    rows = weights.reshape(count, group, -1)
    return np.einsum("gkd,gkd->g", rows, np.linalg.solve(blocks, rows))
