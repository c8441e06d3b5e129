"""The command line `longnet`, with a module for each command that is imported when the command is given.

The module of a command has `DESCRIPTION`, `add_arguments(parser)` and `run(arguments)`, which may return an exit
status, and an `EXAMPLE` where it needs words after its name.  With `TAKES_OVERRIDES` it gets the arguments that its
parser does not know as `arguments.overrides`.  With `run_words` in the place of `run` it gets its words as they are.
Slow imports are inside of `run`, so that `--help` is fast.  LightningCLI runs the commands of the Trainer: fit,
validate, test and predict.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from importlib import import_module
from os import environ
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lightning_longnet.cli.nearest import nearest
from lightning_longnet.cli.ranks import is_first
from lightning_longnet.supervision import standby
from lightning_longnet.trust import HELP as TRUST_HELP
from lightning_longnet.trust import trust_files

if TYPE_CHECKING:
    from collections.abc import Sequence

TRAINER_COMMANDS = {
    "fit": "train a model, from YAML files and overrides",
    "validate": "the validation loss of a model",
    "test": "the test loss of a model",
    "predict": "continue the sequences of a data module",
}
# each is a module of this folder
COMMANDS = {
    "init": "write the configuration of a first run",
    "doctor": "what this machine has, and whether ranks on it compute what one process does",
    "generate": "continue a text with a trained model",
    "score": "the perplexity and bits per byte of text files, with a trained model",
    "needle": "how often a model recalls what is far back, by length and depth",
    "embed": "text files to embeddings, with a trained model",
    "lm_eval": "the tasks of lm-evaluation-harness, with a trained model",
    "tokenize": "text files to a stream of tokens that training reads without loading it",
    "export": "a trained model to safetensors, or to a Hugging Face folder",
    "plan": "memory, bytes and time of a run, before it is launched",
    "report": "a run, or several side by side, as one page to read",
    "convert": "a torchscale LongNet or LongViT to ours",
    "completion": "the script with which bash, zsh or fish completes these commands and their options",
}
_READERS = (
    "generate",
    "score",
    "needle",
    "embed",
    "tokenize",
    "export",
    "report",
    "convert",
)  # of files that others may have written
_SUPERVISION = ("--restarts", "--stall", "--allow")  # options of fit that make it run under a supervisor
HELP_ALL = "--help-all"  # what fit, validate, test and predict print for it is too long for `--help`
_PACKAGE = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status of the process.

    Args:
        arguments: the command and its arguments; those of the process by default.
    """
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
        names = [*TRAINER_COMMANDS, *COMMANDS]
        return _refuse(f"no command {command!r}{nearest(command, names, mark=',')}; there are {', '.join(names)}")
    if command in TRAINER_COMMANDS and (len(given) == 1 or {"-h", "--help"} & set(given)):
        from lightning_longnet.cli.brief import brief_help, missing_arguments

        if len(given) == 1:
            return _refuse(missing_arguments(command))
        print(brief_help(command))  # noqa: T201
        return 0
    try:
        if command == "fit" and any(word.partition("=")[0] in _SUPERVISION for word in given):
            from lightning_longnet.supervision.arguments import split, supervise

            options, given = split(given)
            if options is not None:
                return supervise([sys.executable, "-m", "lightning_longnet", *given], options)
        if command in TRAINER_COMMANDS:
            if "LOCAL_RANK" not in environ:  # importing Lightning takes seconds; of several ranks one tells
                print("longnet: loading torch and Lightning", file=sys.stderr, flush=True)  # noqa: T201
            if not standby.prepare() and arguments is None:
                from lightning_longnet.cli.early import start_ranks

                start_ranks(given)
            from lightning_longnet.cli.trainer import run_trainer

            standby.await_word()
            run_trainer(["--help" if word == HELP_ALL else word for word in given])
        else:
            return run_command(command, given[1:])
    except (ValueError, OSError, ModuleNotFoundError) as error:
        user_error = _user_error(error)
        if user_error is None and command in COMMANDS and isinstance(error, OSError) and error.filename is not None:
            user_error = error  # about a file that the user named
        if user_error is None:
            raise
        return _refuse(_with_notes(user_error))
    finally:
        standby.dismiss()
    return 0


def run_command(command: str, arguments: Sequence[str]) -> int:
    """Parse the arguments of a command of `COMMANDS`, run it, and return its exit status."""
    module, parser = import_module(f"lightning_longnet.cli.{command}"), parser_of(command)
    if hasattr(module, "run_words"):
        if not arguments:
            parser.error("the following arguments are required: options")
        if set(arguments) <= {"-h", "--help"}:
            parser.parse_args(arguments)  # prints the help without importing what the command runs
        return module.run_words(arguments) or 0
    options, others = parser.parse_known_args(arguments)
    takes_overrides = getattr(module, "TAKES_OVERRIDES", False)
    for word in others:
        name = word.partition("=")[0]
        question = nearest(name, parser._option_string_actions, 0.75, ",") if name.startswith("--") else ""
        if not takes_overrides or (question and "." not in name):
            parser.error(f"no option {name}{question}" if name.startswith("-") else f"unrecognized argument: {word}")
    if takes_overrides:
        options.overrides = others  # overrides of the configuration files that the command reads
    if getattr(options, "trust", False):
        trust_files()
    return module.run(options) or 0


def parser_of(command: str) -> argparse.ArgumentParser:
    """Return the parser of a command of `COMMANDS`."""
    module = import_module(f"lightning_longnet.cli.{command}")
    parser = _Parser(
        prog=f"longnet {command}",
        description=module.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.example = getattr(module, "EXAMPLE", "")
    module.add_arguments(parser)
    if command in _READERS:
        parser.add_argument("--trust", action="store_true", help=TRUST_HELP)
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line without the usage, and show what to type where a word is missing."""

    example = ""

    def error(self, message: str) -> NoReturn:
        absent = message.removeprefix("the following arguments are required: ")
        if absent != message:
            message = f"{self.prog} needs {absent}: {self.example}"
        # the ranks of a launcher have the same arguments
        self.exit(2, f"longnet: error: {message}; {self.prog} --help tells more\n" if is_first() else None)


def usage() -> str:
    """Return the text of `longnet --help`."""
    lines = ["usage: longnet COMMAND ...", "", "Exact attention over millions of tokens, for Lightning.", ""]
    width = max(map(len, [*TRAINER_COMMANDS, *COMMANDS])) + 2
    lines += [f"  {name:<{width}}{line}" for name, line in (TRAINER_COMMANDS | COMMANDS).items()]
    lines += [
        "",
        "longnet COMMAND --help tells more.  To begin with: longnet init FOLDER",
        "Overrides follow the files (--model.config.dim 256); --print_config shows what they come to.",
        "longnet fit --restarts 10 ... watches the ranks, and starts them again from the newest checkpoint.",
    ]
    return "\n".join(lines)


def _refuse(message: str) -> int:
    """Print an error, and return the exit status 2."""
    sys.stderr.write(f"longnet: error: {message}\n")  # at once, as other ranks may write at the same time
    return 2


def _with_notes(error: BaseException) -> str:
    """Return the message of an error with its notes; of a note that repeats it, only the rank and the phase."""
    text = str(error)
    places: list[str] = []
    notes: list[str] = []
    repeated = f": {type(error).__name__}: {' '.join(text.split())}"
    for note in getattr(error, "__notes__", ()):
        if note.endswith(repeated):
            places.append(f" ({note.removesuffix(repeated)})")
        else:
            notes.append(note)
    return "\n".join((text + "".join(places), *notes))


def _user_error(error: BaseException | None) -> BaseException | None:
    """Return the error, or one in its chain of causes, that was raised by a line of this package.

    The messages of such errors are for users, and are shown without a traceback.  Return None if there is none: other
    errors are shown with their traceback.
    """
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        if frames and Path(frames[-1].filename).is_relative_to(_PACKAGE):
            return error
        error = error.__cause__ or error.__context__
    return None
