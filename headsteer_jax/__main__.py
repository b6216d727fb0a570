"""`python -m headsteer_jax`: the same as the command `headsteer`."""

from headsteer_jax.cli import main

main()
