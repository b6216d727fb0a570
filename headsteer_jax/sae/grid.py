"""Autoencoders of several k and learning rates, trained together as one program.

The learning rate of each k is chosen on validation.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from headsteer_jax.config.schema import Config, SAEConfig
from headsteer_jax.sae.autoencoder import Autoencoder, select_member
from headsteer_jax.sae.metrics import measure_health
from headsteer_jax.sae.residuals import Residuals
from headsteer_jax.sae.train import Members, TrainedMembers

logger = logging.getLogger(__name__)

Row = dict[str, Any]


def grid_config(config: Config) -> SAEConfig:
    """Return the `sae` section as the grid trains it: with the grid's number of epochs, if it has one."""
    return config.sae.model_copy(update={"epochs": config.grid.epochs or config.sae.epochs})


def grid_ks(config: Config) -> tuple[int, ...]:
    """Return the grid's k; if the config gives none, half of sae.k, sae.k and twice sae.k."""
    default = (min(max(1, round(times * config.sae.k)), config.latents) for times in (0.5, 1, 2))
    return config.grid.k or tuple(dict.fromkeys(default))


def grid_members(c: SAEConfig, ks: tuple[int, ...], rates: tuple[float, ...], count: int) -> Members:
    """Combine every k with every learning rate, `count` seeds each; seed s starts the same in all of them."""
    k, rate, seed = (axis.ravel() for axis in np.meshgrid(ks, rates or (c.learning_rate,), range(count), indexing="ij"))
    number = seed.astype(np.int32)
    return Members(k.astype(np.int32), rate.astype(np.float32), number, number)


def measure_grid(
    config: Config, members: Members, trained: TrainedMembers, sources: Mapping[str, Residuals]
) -> dict[str, Any]:
    """Measure every autoencoder of a grid on every split, and choose the learning rate of each k.

    Args:
      sources: residuals of `train`, `validation` and `test`.

    Returns:
      The content of grid.json: `rows`, one for each autoencoder that stayed finite, and the `best` rate of each k.
    """
    c, rates = grid_config(config), config.grid.learning_rates or (config.sae.learning_rate,)
    rows: list[Row] = []
    for number in range(len(members.k)):
        rate = min(rates, key=lambda candidate: abs(candidate - members.learning_rate[number]))
        if not np.isfinite(trained.curves["mse"][-1, number]):
            logger.info(f"grid: k {members.k[number]}, learning rate {rate:g} diverged to NaN and is left out")
            continue
        k = int(members.k[number])
        sae = Autoencoder(select_member(trained.weights, number), trained.scaling, k if c.inference_k else None)
        on = {name: measure_health(sae, source.chunks()) for name, source in sources.items()}
        rows.append(
            {
                "k": k,
                "learning_rate": rate,
                "seed": int(members.order[number]),
                "validation_explained_variance": on["validation"].explained_variance,
                "explained_variance": on["test"].explained_variance,
                "mse": on["test"].mse,
                "mse_residual": on["test"].mse_residual,
                "l0": on["test"].l0,
                "dead_fraction": float(np.mean(on["train"].frequency == 0)),
            }
        )
    ks = sorted({row["k"] for row in rows})
    best = {str(k): _best_rate([row for row in rows if row["k"] == k]) for k in ks}
    return {"best": best, "rows": rows, "epochs": c.epochs, "latents": config.latents}


def _best_rate(rows: list[Row]) -> dict[str, float]:
    """Choose, among autoencoders of one k, the learning rate that explains most on validation."""
    rates = {row["learning_rate"] for row in rows}
    by_rate = {rate: [row for row in rows if row["learning_rate"] == rate] for rate in rates}
    chosen = max(by_rate, key=lambda rate: np.mean([row["validation_explained_variance"] for row in by_rate[rate]]))
    measures = ("explained_variance", "mse_residual", "l0", "dead_fraction")
    return {"learning_rate": chosen} | {
        name: float(np.mean([row[name] for row in by_rate[chosen]])) for name in measures
    }
