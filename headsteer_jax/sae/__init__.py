"""Sparse autoencoders of a layer's residual: the model, its training, how good it is, what its latents mean."""

import importlib

_MOVED = {
    "SAE": "headsteer_jax.sae.autoencoder",
    "Scaling": "headsteer_jax.sae.autoencoder",
    "fit_scaling": "headsteer_jax.sae.autoencoder",
    "centre": "headsteer_jax.sae.autoencoder",
    "uncentre": "headsteer_jax.sae.autoencoder",
    "top_k": "headsteer_jax.sae.autoencoder",
    "pre_activations": "headsteer_jax.sae.autoencoder",
    "encode": "headsteer_jax.sae.autoencoder",
    "decode": "headsteer_jax.sae.autoencoder",
    "unit_rows": "headsteer_jax.sae.autoencoder",
    "encode_all": "headsteer_jax.sae.autoencoder",
    "encode_residuals": "headsteer_jax.sae.autoencoder",
    "seed_of": "headsteer_jax.sae.autoencoder",
    "folded": "headsteer_jax.sae.autoencoder",
    "MOST": "headsteer_jax.sae.objective",
    "init": "headsteer_jax.sae.objective",
    "batch_threshold": "headsteer_jax.sae.objective",
    "jump": "headsteer_jax.sae.objective",
    "_jump": "headsteer_jax.sae.objective",
    "_jump_vjp": "headsteer_jax.sae.objective",
    "Measured": "headsteer_jax.sae.objective",
    "aux_k_loss": "headsteer_jax.sae.objective",
    "prefix_lengths": "headsteer_jax.sae.objective",
    "loss": "headsteer_jax.sae.objective",
    "without_radial": "headsteer_jax.sae.objective",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
