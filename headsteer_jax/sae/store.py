"""Autoencoders on disk: `sae/autoencoders.npz`, read back with the model that they belong to."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from headsteer_jax.data.dataset import Dataset
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.vit import TrainedModel, fingerprint_params
from headsteer_jax.runtime.files import REMAKE, Workdir, read_arrays
from headsteer_jax.sae.autoencoder import Autoencoder, SAEWeights, Scaling
from headsteer_jax.sae.train import CURVES

FILE = "sae/autoencoders.npz"


@dataclass(frozen=True)
class RunData:
    """The results of the stages train and sae, in memory: everything that steering starts from."""

    trained: TrainedModel
    dataset: Dataset
    autoencoders: Autoencoder  # one for each seed: the weights have a leading axis S
    x_train: np.ndarray  # [N, D] float32 CLS residuals of the training split at the autoencoders' layer


def write_autoencoders(workdir: Workdir, run: RunData, curves: Mapping[str, np.ndarray]) -> None:
    """Write a run's autoencoders, their training residuals and curves to `sae/autoencoders.npz`.

    Raises:
      HeadSteerError: the disk is full or not writable.
    """
    sae = run.autoencoders
    arrays = {f"sae_{name}": values for name, values in sae.weights._asdict().items()}
    arrays |= {"mean": sae.scaling.mean, "scale": sae.scaling.scale, "x_train": run.x_train}
    arrays |= {"layer": np.array(run.trained.config.sae_layer)}
    arrays |= {"model": np.array(fingerprint_params(run.trained.params))}
    curves = {f"curve_{name}": values[:, : sae.members] for name, values in curves.items()}
    workdir.write_arrays(FILE, arrays | curves)


def read_autoencoders(workdir: Workdir, trained: TrainedModel) -> tuple[Autoencoder, np.ndarray, dict[str, np.ndarray]]:
    """Read the autoencoders of a run, checked against its model.

    Returns:
      The autoencoders (leading axis S), the training residuals [N, D], and `sae_mse`, `sae_l0`, `sae_dead`: training
      curves [epochs, S].

    Raises:
      HeadSteerError: the file is missing or damaged, or of another layer or model.
    """
    path, config = workdir / FILE, trained.config
    stored = read_arrays(path)
    names = {"layer", "model", "mean", "scale", "x_train", *(f"sae_{name}" for name in SAEWeights._fields)}
    if missing := sorted(names - set(stored)):
        raise HeadSteerError(f"{path}: it has no {missing[0]!r}, perhaps because an older version made it; {REMAKE}")
    if int(stored["layer"]) != config.sae_layer:
        raise HeadSteerError(f"{path}: made for layer {stored['layer']}, not for {config.sae_layer}; {REMAKE}")
    if str(stored["model"]) != fingerprint_params(trained.params):
        raise HeadSteerError(f"{path}: made from another model's residuals than {workdir / 'train'} holds; {REMAKE}")
    weights = SAEWeights(*(jnp.asarray(stored[f"sae_{name}"]) for name in SAEWeights._fields))
    scaling = Scaling(stored["mean"], stored["scale"])
    curves = {f"sae_{name}": stored[f"curve_{name}"] for name in CURVES}
    return Autoencoder(weights, scaling, config.sae.inference_k), stored["x_train"], curves
