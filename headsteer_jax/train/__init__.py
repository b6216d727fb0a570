"""Training the gated vision transformer: one step, the loop over steps, and the log."""
