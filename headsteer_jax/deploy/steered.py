"""Steering as other biases of the gates: a steered model is an ordinary gated model, and costs no more than that.

With steer.mode add, form delta, target policy and gates without LayerNorm, class steering moves what a layer's gates
read by the same vector for every image, alpha sum_j w_j s_j d_j, and so their logits by a constant. As a deployed model
does not know an image's class, it is steered by the mean of its classes' constants.

Axes: G gates of the layer (heads, then attention and the MLP), S chosen latents, D width.
"""

from typing import NamedTuple

import numpy as np
import xarray

from headsteer_jax.config.schema import Config
from headsteer_jax.deploy.model import DeployedModel
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.sae.autoencoder import Autoencoder
from headsteer_jax.steer.by_image import ImageStrategy
from headsteer_jax.steer.catalogue import STRATEGIES
from headsteer_jax.steer.flips import is_affine_in_alpha
from headsteer_jax.steer.gates import LayerGates
from headsteer_jax.steer.strategies import Choice


class ClassSteering(NamedTuple):
    """The latents that a strategy changes for some classes, in one autoencoder, or directions without one."""

    sae: Autoencoder
    strength: np.ndarray  # [F] mean activation where a latent fires
    choice: Choice  # a row for each class; the latent -1 fills up strategies that choose fewer


def check_foldable(config: Config, alpha: float) -> None:
    """Check that steering is a constant on the gates' logits.

    Raises:
      HeadSteerError: it depends on the image.
    """
    steer = config.steer
    if alpha < 0:
        raise HeadSteerError(
            f"--alpha={alpha:g}: must not be negative, because latents stop at 0, so that the effect depends on the "
            "image; choose a positive one"
        )
    if not is_affine_in_alpha(steer, config.gate.layer_norm):
        raise HeadSteerError(
            f"--steer: folds into the gates' biases only with steer.mode = 'add' (here {steer.mode!r}), steer.form = "
            f"'delta' ({steer.form!r}), steer.target = 'policy' ({steer.target!r}) and gate.layer_norm = False "
            f"({config.gate.layer_norm}); deploy without --steer, or compute a run with these settings"
        )


def find_choice(sweep: xarray.Dataset, strategy: str, labels: np.ndarray) -> Choice:
    """Find what a strategy chose for some classes with the first autoencoder.

    Raises:
      HeadSteerError: the run's sweep has no such strategy, it has weights below 0, or it chooses for each image.
    """
    names = [str(name) for name in sweep["strategy"].values]
    if isinstance(STRATEGIES.get(strategy), ImageStrategy):
        raise HeadSteerError(
            f"--steer={strategy}: chooses for each image by itself, and so does not fold into biases; choose another "
            "strategy"
        )
    if strategy not in names:
        raise HeadSteerError(
            f"--steer={strategy}: the run's sweep has no such strategy; choose from {', '.join(names)}"
        )
    chosen = sweep.isel(seed=0, strategy=names.index(strategy))
    latents, weights = (np.asarray(chosen[name].values)[labels] for name in ("latents", "weights"))
    if np.any(weights < 0):
        raise HeadSteerError(
            f"--steer={strategy}: has weights below 0, with which latents stop at 0, so that the effect depends on the "
            "image; choose another strategy"
        )
    if (latents >= 0).any():
        return Choice(latents, weights)
    return Choice(latents, weights, np.asarray(chosen["directions"].values)[labels])


def shift_logits(steering: ClassSteering, kernel_DG: np.ndarray, alpha: float) -> np.ndarray:
    """Compute by how much steering moves the gates' logits, in the mean of the classes: [G] float64."""
    latents, weights, directions = steering.choice
    amount = np.where(latents >= 0, weights * steering.strength[latents], 0.0)
    moved_D = np.einsum("cs,csd->d", amount, np.asarray(steering.sae.decoder, np.float64)[latents])
    if directions is not None:
        moved_D = directions.sum(axis=0, dtype=np.float64)
    return alpha * moved_D @ kernel_DG / len(latents)


def fold_steering(model: DeployedModel, config: Config, steering: ClassSteering, alpha: float) -> DeployedModel:
    """Fold the steering of the autoencoder's layer into the biases of its gates.

    Args:
      model: a dynamic model.
      config: the run's.
    """
    gates, layers = LayerGates(config, config.sae_layer), list(model.params["layers"])
    gate_params = dict(layers[config.sae_layer]["gates"])
    kernel_DG = np.asarray(
        gates.join({kind: np.asarray(gate_params[kind]["kernel"], np.float64) for kind in gates.kinds})
    )
    shift = gates.split(shift_logits(steering, kernel_DG, alpha))
    for kind in gates.kinds:
        gate_params[kind] = gate_params[kind] | {"bias": (gate_params[kind]["bias"] + shift[kind]).astype(np.float32)}
    layers[config.sae_layer] = layers[config.sae_layer] | {"gates": gate_params}
    return DeployedModel(model.config, model.params | {"layers": layers})
