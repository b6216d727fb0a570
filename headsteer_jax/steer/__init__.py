"""Steering: the choice of latents, the effect of changing them on the gates, and the sweep over every setting."""
