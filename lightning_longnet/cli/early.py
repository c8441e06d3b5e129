"""The ranks that a command of the Trainer starts beside the first one, before that has read its configuration."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_longnet.cli.given import given_option
from lightning_longnet.registration import NAMES
from lightning_longnet.supervision import standby

if TYPE_CHECKING:
    from collections.abc import Sequence

# of launchers, which have started all ranks already
_RANKS = ("LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "JSM_NAMESPACE_RANK", "LSB_JOBID")
_SHOWS = ("--help", "-h", "--print_config")  # words with which a command trains nothing


def start_ranks(words: Sequence[str]) -> None:
    """Start the other ranks of this node, which import what they need while this process does.

    `WatchedLauncher` lets them go on.  A wrong guess costs their imports: where the launcher needs another number of
    ranks, or none, they end.
    """
    command = _own_command()
    count = 0 if command is None or set(_RANKS) & os.environ.keys() else other_ranks(words)
    if command is not None and count:
        standby.start(command, count)


def other_ranks(words: Sequence[str]) -> int:
    """Return how many ranks a command line of the Trainer starts beside the first, as far as its words and files say.

    None are counted with the strategies of others, where words or files cannot be read, and where ranks share a core.
    """
    if any(word.startswith(_SHOWS) for word in words):
        return 0
    try:
        count = _count(given_option("trainer.devices", words).value)
        strategy = given_option("trainer.strategy", words).value
    except (ValueError, OSError, yaml.YAMLError):  # the parser tells what is wrong
        return 0
    name = strategy.get("class_path") if isinstance(strategy, dict) else strategy
    is_own = isinstance(name, str) and (name in NAMES or name.endswith("RingSequenceParallelStrategy"))
    if not is_own:
        return 0
    return count - 1 if 1 < count <= (os.cpu_count() or 1) else 0


def _count(devices: Any) -> int:
    if isinstance(devices, str):
        devices = yaml.safe_load(devices)
    return len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) else 0


def _own_command() -> list[str] | None:
    """Return the command that started this process, as Lightning starts other ranks; None for other programs."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        is_own = spec.name == "lightning_longnet.__main__"
        return [sys.executable, "-m", spec.name, *sys.argv[1:]] if is_own else None
    path = Path(sys.argv[0]).absolute()
    return [sys.executable, str(path), *sys.argv[1:]] if path.stem == "longnet" else None
