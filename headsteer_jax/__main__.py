"""The module that `python -m headsteer_jax` runs: the same as the command `headsteer`."""

from headsteer_jax.cli import main

main()
