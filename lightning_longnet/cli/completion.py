"""`longnet completion`: print the script with which a shell completes commands, options and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """Print a script with which a shell completes the commands of longnet, their options and values.

  longnet completion bash > ~/.local/share/bash-completion/completions/longnet
  longnet completion zsh > "${fpath[1]}/_longnet"
  longnet completion fish > ~/.config/fish/completions/longnet.fish

The folder must exist, and shells that are started afterwards complete.  Without the package bash-completion, write the
script to any file, and add `source FILE` to ~/.bashrc.  The script holds the options of this version of longnet, so
that no key waits for Python: print it again after an update."""

EXAMPLE = "longnet completion bash > ~/.local/share/bash-completion/completions/longnet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell")


def run(arguments: argparse.Namespace) -> None:
    """Print the script."""
    from lightning_longnet.cli.options import commands
    from lightning_longnet.cli.shells import SHELLS

    print(SHELLS[arguments.shell](commands()), end="")  # noqa: T201
