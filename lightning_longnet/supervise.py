"""`python -m lightning_longnet.supervise -- python train.py`: a run whose ranks are watched and started again.

It ends all ranks of this node where one dies, is stopped or makes no progress, says which and where, and starts the
command again, which goes on from its newest checkpoint.  docs/restarting.md explains more.
"""

from __future__ import annotations

import argparse
import sys

from lightning_longnet.supervision.arguments import RESTARTS, add_options, options_of, supervise


def main(words: list[str] | None = None) -> int:
    """Run the command that follows the options, or `--`, and return the exit status of the process."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_longnet.supervise",
        usage="%(prog)s [--restarts N] [--stall SECONDS] [--allow PHASE=SECONDS] -- COMMAND ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser, RESTARTS)
    # torchrun takes the -- that follows the name of a module
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="the program and its arguments")
    arguments = parser.parse_args(words)
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    try:
        return supervise(command, options_of(arguments))
    except (ValueError, FileNotFoundError) as error:
        print(f"supervise: error: {error}", file=sys.stderr)  # noqa: T201
        return 2


if __name__ == "__main__":
    sys.exit(main())
