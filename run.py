"""The script `python run.py ...`, which does in a clone what `headsteer run ...` does."""

import sys

from headsteer_jax.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
