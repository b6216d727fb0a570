"""How good an autoencoder is: how well and how sparsely it describes a split, what its latents are, how stable it is.

Sums over a split are accumulated in float64, over the whole of it. Axes: N residuals, D width, F latents, C classes.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array

from headsteer_jax.sae.autoencoder import Autoencoder, encode_chunks, row_slices, scale_input

MATCHED_ROWS = 4096  # decoder rows


class Health(NamedTuple):
    """How well one autoencoder describes a split."""

    mse: float  # mean squared error per component of the scaled input u
    mse_residual: float  # the same in the residual's own units, as [LH26] reports it
    explained_variance: float  # 1 - sum |u - u_hat|^2 / sum |u - mean(u)|^2, against the split's vector mean
    l0: float  # mean number of active latents
    frequency: np.ndarray  # [F], share of the split on which each latent fires


def measure_health(sae: Autoencoder, chunks: Iterable[np.ndarray]) -> Health:
    """Measure one autoencoder on one split, [n, D] residuals at a time."""
    W_d, b_d = np.asarray(sae.weights.W_d, np.float64), np.asarray(sae.weights.b_d, np.float64)
    error, squares, total_D, count = 0.0, 0.0, np.zeros(len(b_d)), 0
    fired_F = np.zeros(len(W_d), np.int64)
    parts = (x_BD for x_nD in chunks for x_BD in np.array_split(x_nD, -(-len(x_nD) // 4096)))
    for x_BD, dense_BF in encode_chunks(sae, parts):
        z_BF, u_BD = csr_array(dense_BF), np.asarray(scale_input(sae.scaling, x_BD), np.float64)
        error += np.sum((u_BD - (z_BF.astype(np.float64) @ W_d + b_d)) ** 2)
        squares, total_D, count = squares + np.sum(u_BD**2), total_D + u_BD.sum(axis=0), count + len(u_BD)
        fired_F += np.bincount(z_BF.indices, minlength=len(W_d))
    mse = error / (count * len(b_d))
    return Health(
        mse=float(mse),
        mse_residual=float(mse / np.float64(sae.scaling.scale) ** 2),
        explained_variance=float(1.0 - error / (squares - np.sum(total_D**2) / count)),
        l0=float(fired_F.sum() / count),
        frequency=fired_F / count,
    )


def nearest_cosines(W_FD: np.ndarray, chunk: int = 1024) -> np.ndarray:
    """[F] each decoder row's largest cosine with another row: near 1 where two latents are one."""
    unit = W_FD / np.maximum(np.linalg.norm(W_FD, axis=1, keepdims=True), 1e-12)
    best = np.empty(len(unit), unit.dtype)
    for begin in range(0, len(unit), chunk):
        cosines = unit[begin : begin + chunk] @ unit.T
        cosines[np.arange(len(cosines)), begin + np.arange(len(cosines))] = -1.0  # not with itself
        best[begin : begin + chunk] = cosines.max(axis=1)
    return best


def mean_activation_by_class(sae: Autoencoder, x_ND: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """[C, F] float64 mean activation of each latent on the images of each class; 0 for a class without images."""
    sums_CF, counts_C = np.zeros((classes, len(sae.weights.b_e))), np.bincount(labels, minlength=classes)
    labels_of = row_slices(labels, 4096)
    for (_, z_BF), labels_B in zip(encode_chunks(sae, row_slices(x_ND, 4096)), labels_of, strict=True):
        member_CB = csr_array((np.ones(len(labels_B)), (labels_B, np.arange(len(labels_B)))),
                              shape=(classes, len(labels_B)))  # fmt: skip
        sums_CF += (member_CB @ csr_array(z_BF)).toarray()
    return sums_CF / np.maximum(counts_C, 1)[:, None]


def class_selectivity(mean_CF: np.ndarray) -> np.ndarray:
    """[F] class selectivity index (Morcos et al. 2018, arXiv:1803.06959): (m - r) / (m + r), 0 to 1.

    m is a latent's mean activation on the class where that is largest, r the mean of its means on the other classes. 1:
    it fires on one class only; 0: on all alike, or never.
    """
    most = mean_CF.max(axis=0)
    rest = (mean_CF.sum(axis=0) - most) / max(len(mean_CF) - 1, 1)
    return np.where(most > 0, (most - rest) / np.maximum(most + rest, 1e-30), 0.0)


def summarise_latents(W_FD: np.ndarray, frequency_F: np.ndarray, mean_CF: np.ndarray, dense: float) -> dict[str, float]:
    """What an autoencoder's latents are like.

    Args:
      frequency_F: share of the training split on which each fires.
      mean_CF: their class means there.
      dense: frequency above which a latent counts as dense.

    Returns:
      `dead_fraction` and `dense_fraction` of all; of the living ones the means of `max_cosine` and `class_selectivity`,
      and `twins`, the share whose nearest other is above 0.9.
    """
    living = frequency_F > 0
    nearest = nearest_cosines(W_FD[living]) if living.sum() > 1 else np.zeros(1)
    selectivity = class_selectivity(mean_CF[:, living]) if living.any() else np.zeros(1)
    return {
        "dead_fraction": float(np.mean(~living)),
        "dense_fraction": float(np.mean(frequency_F > dense)),
        "max_cosine": float(nearest.mean()),
        "twins": float(np.mean(nearest > 0.9)),
        "class_selectivity": float(selectivity.mean()),
    }


def match_decoders(A_FD: np.ndarray, B_FD: np.ndarray) -> float:
    """Mean cosine of decoder rows under the best one-to-one matching (Hungarian algorithm; Fel et al. 2025,
    arXiv:2502.12892): 1 where one autoencoder's latents are the other's in another order.

    Of dictionaries of different sizes the smaller is matched whole; of a first one of more than 4,096 rows so many,
    drawn at random, as the time grows with the square. NaN where one is empty.
    """
    if len(A_FD) > MATCHED_ROWS:
        A_FD = A_FD[np.random.default_rng(0).choice(len(A_FD), MATCHED_ROWS, replace=False)]
    if not len(A_FD) or not len(B_FD):
        return float("nan")
    A, B = (W / np.maximum(np.linalg.norm(W, axis=1, keepdims=True), 1e-12) for W in (A_FD, B_FD))
    cosines = A @ B.T
    return float(np.mean(cosines[linear_sum_assignment(cosines, maximize=True)], dtype=np.float64))


def compare_seeds(seeds: list[np.ndarray], control: list[np.ndarray]) -> dict[str, float | None]:
    """How alike autoencoders of different seeds are (`match_decoders` of living decoder rows), and beside what.

    Args:
      seeds: each seed's living decoder rows, [F', D].
      control: those of one more that began as the first seed did and saw the data in another order; or nothing.

    Returns:
      `seeds`: the mean over pairs; `same_start`: the first seed and the control; `random`: the first seed and rows
      drawn evenly from the sphere, which is what matching alone gives. None where there is nothing to compare.
    """
    pairs = [match_decoders(a, b) for i, a in enumerate(seeds) for b in seeds[i + 1 :]]
    rows = np.random.default_rng(0).standard_normal(seeds[0].shape)

    def known(value: float) -> float | None:
        return value if np.isfinite(value) else None

    return {
        "seeds": known(float(np.mean(pairs))) if pairs else None,
        "same_start": known(match_decoders(seeds[0], control[0])) if control else None,
        "random": known(match_decoders(seeds[0], rows)),
    }
