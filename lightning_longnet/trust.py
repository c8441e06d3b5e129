"""The limits of what files may name and where they may lead, and the trust of a user that lifts these limits."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

VARIABLE = "LONGNET_TRUST"
ADVICE = f"if you trust where it comes from, give --trust, trust=True, or {VARIABLE}=1 in the environment"
HELP = "trust the files that are read: run code that they hold, import classes they name, leave their folder"
# The packages whose classes a file may name.  Others it may name only where the program has imported them already
PACKAGES = ("lightning_longnet", "torch.nn", "torch.optim", "lightning")


def is_trusted(trust: bool = False) -> bool:
    """Return whether files may run code: where `trust` says so, or the environment."""
    return trust or os.environ.get(VARIABLE, "0").lower() in ("1", "true", "yes")


def trust_files() -> None:
    """Trust the files of this process and of those that it starts, as the option --trust of a command does."""
    os.environ[VARIABLE] = "1"


def check_class(name: str, path: object, trust: bool = False) -> None:
    """Raise a ValueError where a file names a class by a path that would import a module from outside of `PACKAGES`.

    Args:
        name: the key of the file that names it.
        path: the path of the class.
        trust: whether the file is trusted.
    """
    if is_trusted(trust) or not isinstance(path, str):  # what is no path is refused where it is used
        return
    module = path.rpartition(".")[0]
    is_known = any(module == each or module.startswith(f"{each}.") for each in PACKAGES)
    if not is_known and module not in sys.modules:
        raise ValueError(
            f"{name} must be a class of {', '.join(PACKAGES)}, or of a module that is imported already, got {path}: "
            f"importing it could run any code; import it before, or {ADVICE}"
        )


def confined(name: str, path: Path, root: Path, trust: bool = False) -> Path:
    """Return a path that a folder leads to; raise a ValueError where it is outside of the folder.

    Args:
        name: what leads there, for the message.
        path: the path, with the folder before it.
        root: the folder.
        trust: whether the folder is trusted.
    """
    if not is_trusted(trust) and not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"{name} must stay in the folder {root}, got {path}, which leads to {path.resolve()}: copy it there, or "
            f"{ADVICE}"
        )
    return path
