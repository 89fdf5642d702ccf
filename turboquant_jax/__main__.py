"""`python -m turboquant_jax` is the command `turboquant-jax`."""

import sys

from turboquant_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
