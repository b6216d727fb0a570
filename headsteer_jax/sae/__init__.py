"""Sparse autoencoders of a layer's residual: the model, its training, how good it is, what its latents mean."""
