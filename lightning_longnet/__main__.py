"""`python -m lightning_longnet`: the command line `longnet`, also where that script is not on the path."""

import sys

from lightning_longnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
