"""The vision transformer with gates: its parts, published weights, its cost, and forward passes over a split."""
