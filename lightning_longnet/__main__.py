"""python -m lightning_longnet: the command line, where the script `longnet` is not on the path."""

import sys

from lightning_longnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
