"""HeadSteer: steer a sparse autoencoder's latents to control which attention heads a vision transformer runs."""

__version__ = "0.1.0"
