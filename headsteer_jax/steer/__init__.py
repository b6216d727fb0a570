"""Steering: which latents to change, what that does to the gates, and the sweep over every setting."""
