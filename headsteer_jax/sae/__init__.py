"""Sparse autoencoders of a layer's residual: the model, its training, its quality, and what its latents mean."""
