"""The options of a supervisor, on the command line of `supervise` and among those of `longnet fit`."""

from __future__ import annotations

import argparse
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lightning_longnet.supervision.supervisor import INTERRUPTED, MISUSE, TERMINATED, Supervisor
from lightning_longnet.supervision.watch import ALLOWANCES, Limits

if TYPE_CHECKING:
    from collections.abc import Sequence

RESTARTS = 10
FAILED = 200  # the status of a supervisor in srun whose rank failed


class Options(NamedTuple):
    """The options of supervision: the restarts without a new step, and the times without progress of ranks."""

    restarts: int
    limits: Limits


def add_options(parser: argparse.ArgumentParser, restarts: int | None) -> None:
    """Add the options of a supervisor to a parser, with the default number of restarts.

    `main` of supervise.py calls it for its own command line, and `split` for that of `longnet fit`.
    """
    parser.add_argument("--restarts", type=_whole, default=restarts, help="how often, without a new step in between")
    parser.add_argument(
        "--stall", type=_seconds, help="seconds of a step without progress: by default ten median steps, at least 60"
    )
    parser.add_argument(
        "--allow", type=_allowance, action="append", default=[], metavar="PHASE=SECONDS",
        help="seconds of another phase without progress; by default "
        + ", ".join(f"{name}={seconds:.0f}" for name, seconds in ALLOWANCES.items()),
    )  # fmt: skip


def options_of(arguments: argparse.Namespace) -> Options:
    """Return what the options that were parsed say; `main` of supervise.py asks, and `split`."""
    return Options(arguments.restarts, Limits(arguments.stall, dict(arguments.allow)))


def split(words: Sequence[str]) -> tuple[Options | None, list[str]]:
    """Return the options of a supervisor among the words of `longnet fit`, None without `--restarts`, and the rest.

    `main` of the command line calls it, and then `supervise` if there are options.  A wrong option raises a ValueError.
    """
    parser = argparse.ArgumentParser(prog="longnet fit", add_help=False, allow_abbrev=False, exit_on_error=False)
    add_options(parser, None)
    try:
        arguments, rest = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if arguments.restarts is None:
        if arguments.stall is not None or arguments.allow:
            raise ValueError("--stall and --allow need --restarts N: without it nothing watches the ranks")
        return None, list(words)
    return options_of(arguments), rest


def supervise(command: Sequence[str], options: Options) -> int:
    """Run a command under a supervisor, and return its exit status.

    `main` of supervise.py calls it, and `main` of the command line for `longnet fit --restarts N`.  Where another
    program has started this process as one of several, as torchrun and srun do, that program starts ranks again: the
    supervisor watches its own alone.
    """
    if not sys.platform.startswith("linux"):
        raise ValueError(f"a supervisor reads /proc, which Linux has, got {sys.platform}: run the command by itself")
    if not command:
        raise ValueError("supervise needs a command after --, as in supervise --restarts 10 -- python train.py")
    if _starts_agents(command):
        raise ValueError(
            "torchrun starts ranks again by itself, and a supervisor belongs inside of it: "
            "torchrun --standalone --max-restarts 10 -m lightning_longnet.supervise -- python train.py"
        )
    given = os.environ
    is_in_srun = int(given.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    is_one_of_several = "TORCHELASTIC_RUN_ID" in given or is_in_srun
    attempts = (given.get("TORCHELASTIC_RESTART_COUNT"), given.get("SLURM_RESTART_COUNT"))
    resumes = any(int(each or 0) > 0 for each in attempts)
    restarts = 0 if is_one_of_several else options.restarts
    status = Supervisor(command, options.limits, restarts, resumes=resumes).run()
    # srun returns the highest status of its tasks: a rank that failed must count for more than those it then ends
    return FAILED if is_in_srun and status not in (0, MISUSE, TERMINATED, INTERRUPTED) else status


def _starts_agents(command: Sequence[str]) -> bool:
    """Return whether a command is torchrun, which starts ranks again by itself."""
    words = list(command)
    is_module = ("-m", "torch.distributed.run") in pairwise(words)
    return Path(words[0]).name == "torchrun" or is_module


def _whole(text: str) -> int:
    """Return the value of `--restarts`; argparse calls it."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 0, got {text}")
    return int(text)


def _seconds(text: str) -> float:
    """Return the value of `--stall`, or the seconds of `--allow`; argparse calls it."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, more than 0, got {text}")
    return seconds


def _allowance(text: str) -> tuple[str, float]:
    """Return (phase, seconds) of a value of `--allow`; argparse calls it."""
    name, _, seconds = text.partition("=")
    if name not in ALLOWANCES:
        raise argparse.ArgumentTypeError(f"must be PHASE=SECONDS of one of {', '.join(ALLOWANCES)}, got {text}")
    return name, _seconds(seconds)
