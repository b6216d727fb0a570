"""Measures of an autoencoder: how well and how sparsely it describes a split, what its latents are, how stable it is.

Sums over a split are accumulated in float64. Axes: N residuals, D width, F latents, C classes, S autoencoders.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array

from headsteer_jax.config.schema import SAEConfig
from headsteer_jax.sae.autoencoder import Autoencoder, encode_chunks, row_slices, scale_input
from headsteer_jax.sae.residuals import LabelledResiduals, Residuals

MATCHED_ROWS = 4096  # decoder rows that are matched, at most


class Health(NamedTuple):
    """How well one autoencoder describes a split."""

    mse: float  # mean squared error per component of the scaled input u
    mse_residual: float  # the same in the residual's units, as [LH26] reports it
    explained_variance: float  # 1 - sum |u - u_hat|^2 / sum |u - mean(u)|^2, against the split's vector mean
    l0: float  # mean number of active latents
    frequency: np.ndarray  # [F], share of the split on which each latent fires


def measure_health(sae: Autoencoder, chunks: Iterable[np.ndarray]) -> Health:
    """Measure one autoencoder on one split, [n, D] residuals at a time."""
    W_d, b_d = np.asarray(sae.weights.W_d, np.float64), np.asarray(sae.weights.b_d, np.float64)
    error, squares, total_D, count = 0.0, 0.0, np.zeros(len(b_d)), 0
    fired_F = np.zeros(len(W_d), np.int64)
    parts = (x_BD for x_nD in chunks for x_BD in np.array_split(x_nD, -(-len(x_nD) // 4096)))
    for x_BD, z_BF in encode_chunks(sae, parts):
        u_BD = np.asarray(scale_input(sae.scaling, x_BD), np.float64)
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
    """Compute each decoder row's largest cosine with another row, [F]: near 1 if two latents are one."""
    unit = W_FD / np.maximum(np.linalg.norm(W_FD, axis=1, keepdims=True), 1e-12)
    best = np.empty(len(unit), unit.dtype)
    for begin in range(0, len(unit), chunk):
        cosines = unit[begin : begin + chunk] @ unit.T
        cosines[np.arange(len(cosines)), begin + np.arange(len(cosines))] = -1.0  # not with itself
        best[begin : begin + chunk] = cosines.max(axis=1)
    return best


def mean_activation_by_class(sae: Autoencoder, x_ND: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Average each latent over the images of each class: [C, F] float64; 0 for a class without images."""
    sums_CF, counts_C = np.zeros((classes, len(sae.weights.b_e))), np.bincount(labels, minlength=classes)
    label_chunks = row_slices(labels, 4096)
    for (_, z_BF), labels_B in zip(encode_chunks(sae, row_slices(x_ND, 4096)), label_chunks, strict=True):
        member_CB = csr_array((np.ones(len(labels_B)), (labels_B, np.arange(len(labels_B)))),
                              shape=(classes, len(labels_B)))  # fmt: skip
        sums_CF += (member_CB @ z_BF).toarray()
    return sums_CF / np.maximum(counts_C, 1)[:, None]


def class_selectivity(mean_CF: np.ndarray) -> np.ndarray:
    """Compute the class selectivity index, [F]: (m - r) / (m + r), 0 to 1 (Morcos et al. 2018, arXiv:1803.06959).

    m is a latent's mean activation on the class on which it is largest, r the mean of its means elsewhere.
    1: it fires on one class only; 0: on all classes equally, or never.
    """
    largest_F = mean_CF.max(axis=0)
    elsewhere_F = (mean_CF.sum(axis=0) - largest_F) / max(len(mean_CF) - 1, 1)
    return np.where(largest_F > 0, (largest_F - elsewhere_F) / np.maximum(largest_F + elsewhere_F, 1e-30), 0.0)


def summarise_latents(W_FD: np.ndarray, frequency_F: np.ndarray, mean_CF: np.ndarray, dense: float) -> dict[str, float]:
    """Summarise an autoencoder's latents.

    Args:
      W_FD: decoder rows.
      frequency_F: share of the training split on which each latent fires.
      mean_CF: the latents' class means on that split.
      dense: frequency above which a latent counts as dense.

    Returns:
      `dead_fraction` and `dense_fraction` of all latents; of the living ones the means of `max_cosine` and
      `class_selectivity`, and `twins`, the share with a cosine above 0.9 to another one.
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
    """Compute the mean cosine of decoder rows under the best one-to-one matching.

    It is 1 if one autoencoder's latents are the other's in another order (Hungarian algorithm; Fel et al. 2025,
    arXiv:2502.12892). If the dictionaries differ in size, every row of the smaller one is matched. Of a first one with
    more than MATCHED_ROWS rows so many are drawn at random, as the time grows with the square. NaN if one is empty.
    """
    if len(A_FD) > MATCHED_ROWS:
        A_FD = A_FD[np.random.default_rng(0).choice(len(A_FD), MATCHED_ROWS, replace=False)]
    if not len(A_FD) or not len(B_FD):
        return float("nan")
    A, B = (W / np.maximum(np.linalg.norm(W, axis=1, keepdims=True), 1e-12) for W in (A_FD, B_FD))
    cosines = A @ B.T
    return float(np.mean(cosines[linear_sum_assignment(cosines, maximize=True)], dtype=np.float64))


def compare_seeds(seeds: list[np.ndarray], control: list[np.ndarray]) -> dict[str, float | None]:
    """Compare autoencoders of different seeds by `match_decoders` of their living decoder rows.

    Args:
      seeds: each seed's living decoder rows, [F', D].
      control: those of the control, which began as the first seed did and saw the data in another order; or nothing.

    Returns:
      `seeds`: the mean over pairs; `same_start`: the first seed and the control; `random`: the first seed and rows
      drawn uniformly from the sphere, the result of matching alone. None if there is nothing to compare.
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


def measure_autoencoders(
    members: Autoencoder, c: SAEConfig, train: LabelledResiduals, test: Residuals, replacement: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Measure the autoencoders of a run: the content of health.json.

    Args:
      members: c.seeds autoencoders, and after them the control, if there is one.
      c: the section `sae`.
      train: the training split, on which latents are counted as dead or dense.
      test: the test split's residuals, on which the reconstruction is measured.
      replacement: further figures, a value [S] for each seed.

    Returns:
      Means over seeds of every figure; `seeds`: a row of figures for each; `stability`: see `compare_seeds`.
    """
    rows, living = [], []
    for number in range(members.members):
        sae = members.member(number)
        frequency = measure_health(sae, train.residuals.chunks()).frequency
        decoder_FD = np.asarray(sae.weights.W_d)
        living.append(decoder_FD[frequency > 0])
        if number == c.seeds:
            break  # the control only serves for comparison
        on_test = measure_health(sae, test.chunks())._asdict()
        mean_CF = mean_activation_by_class(sae, train.x_cls, train.labels, train.classes)
        rows.append(
            {name: value for name, value in on_test.items() if name != "frequency"}
            | summarise_latents(decoder_FD, frequency, mean_CF, c.dense_frequency)
            | {name: float(values[number]) for name, values in replacement.items()}
        )
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return means | {"seeds": rows, "stability": compare_seeds(living[: c.seeds], living[c.seeds :])}
