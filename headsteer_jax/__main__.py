"""The module that `python -m headsteer_jax` runs: the same as the command `headsteer`."""

import sys

# Python puts the current directory first: a user's random.py there must not stand in for a library's
sys.path[:] = sys.path if sys.flags.safe_path else sys.path[1:]

from headsteer_jax.cli import main  # noqa: E402

main()
