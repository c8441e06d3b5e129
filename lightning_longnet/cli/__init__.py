"""The command line `longnet`: a file for each command, which is loaded when the command is given.

A command is a module with `DESCRIPTION`, `add_arguments(parser)` and `run(arguments)`; with `TAKES_OVERRIDES` it is
handed words that it does not know, as `arguments.overrides`.  It imports nothing at its top
that takes long, so that every help comes at once.  What is a Trainer's goes to LightningCLI.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

TRAINER_COMMANDS = {
    "fit": "train a model, from YAML files and overrides",
    "validate": "the validation loss of a model",
    "test": "the test loss of a model",
    "predict": "continue the sequences of a data module",
}
# each a module of this folder
COMMANDS = {
    "generate": "continue a text with a trained model",
    "tokenize": "text files to a stream of tokens that training reads without loading it",
    "export": "a trained model to safetensors, or to a Hugging Face folder",
    "plan": "memory, bytes and time of a run, before it is launched",
    "report": "a run, or several side by side, as one page to read",
    "convert": "a torchscale LongNet or LongViT to ours",
}
_PACKAGE = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """The status that the process ends with."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given[0] if given else "--help"
    if command in ("-h", "--help"):
        print(usage())  # noqa: T201
        return 0
    if command == "--version":
        from lightning_longnet import __version__

        print(__version__)  # noqa: T201
        return 0
    if command not in TRAINER_COMMANDS and command not in COMMANDS:
        return _refuse(f"no command {command!r}; there are {', '.join([*TRAINER_COMMANDS, *COMMANDS])}")
    try:
        if command in TRAINER_COMMANDS:
            from lightning_longnet.cli.trainer import run_trainer

            run_trainer(given)
        else:
            run_command(command, given[1:])
    except (ValueError, OSError) as error:
        told = _told_by_us(error)
        if told is None and command in COMMANDS and isinstance(error, OSError) and error.filename is not None:
            told = error  # of a file that was named, or is to lie where one was
        if told is None:
            raise
        return _refuse(str(told))
    return 0


def run_command(command: str, arguments: Sequence[str]) -> None:
    module = import_module(f"lightning_longnet.cli.{command}")
    parser = argparse.ArgumentParser(
        prog=f"longnet {command}",
        description=module.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    told, others = parser.parse_known_args(arguments)
    if getattr(module, "TAKES_OVERRIDES", False):
        told.overrides = others  # of the files that it reads
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    module.run(told)


def usage() -> str:
    lines = ["usage: longnet COMMAND ...", "", "Exact attention over millions of tokens, for Lightning.", ""]
    width = max(map(len, [*TRAINER_COMMANDS, *COMMANDS])) + 2
    lines += [f"  {name:<{width}}{line}" for name, line in (TRAINER_COMMANDS | COMMANDS).items()]
    lines += [
        "",
        "longnet COMMAND --help tells more.  To begin with: longnet fit --config configs/quickstart.yaml",
        "Overrides follow the files (--model.config.dim 256); --print_config shows what they come to.",
    ]
    return "\n".join(lines)


def _refuse(message: str) -> int:
    print(f"longnet: error: {message}", file=sys.stderr)  # noqa: T201
    return 2


def _told_by_us(error: BaseException | None) -> BaseException | None:
    """What a line of this package raised, for its user, whoever wrapped it: the message says it all.

    None for other errors, which show where they come from.
    """
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        if frames and Path(frames[-1].filename).is_relative_to(_PACKAGE):
            return error
        error = error.__cause__ or error.__context__
    return None
