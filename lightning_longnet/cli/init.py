"""`longnet init`: write the configuration of a first run into a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """Write quickstart.yaml, the commented configuration of a small run, into a folder.

  longnet init first
  cd first && longnet fit --config quickstart.yaml

It trains a byte-level model on the sources of Python's standard library, on two CPU processes, in two minutes."""

EXAMPLE = "longnet init first"
NAME = "quickstart.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("folder", help="the folder, which is made where it does not exist")


def run(arguments: argparse.Namespace) -> None:
    """Write the file, and print the commands that come next."""
    import shlex
    from pathlib import Path

    folder = Path(arguments.folder)
    target = folder / NAME
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder must be a folder, or a new name, got {folder}, which is a file")
    if target.exists():
        raise ValueError(f"folder must have no {NAME}, which would be overwritten, got {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text(content())
    steps = [] if folder == Path() else [f"cd {shlex.quote(str(folder))}"]
    commands = {
        "longnet doctor --ranks 2": "whether two processes here compute what one does",
        f"longnet plan --config {NAME} --device cpu": "memory and time of the run",
        f"longnet fit --config {NAME}": "the run",
    }
    width = max(map(len, commands))
    steps += [f"{command:<{width}}  # {purpose}" for command, purpose in commands.items()]
    print("\n".join([f"Wrote {target}.", "Next:", *(f"  {step}" for step in steps)]))  # noqa: T201


def content() -> str:
    """Return the text of the file, whose commands are for the folder that holds it."""
    from pathlib import Path

    return (Path(__file__).parent / NAME).read_text().replace(f"configs/{NAME}", NAME)
