"""DeepSpeed's checkpoints for another number of ranks: conversion to its universal format."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_FORMAT = "checkpoint_universal"
_WRITTEN_LAST = "latest_universal"


def saved_ranks(checkpoint: Path) -> int:
    """Return the number of ranks that wrote a checkpoint, or 0 where it holds no optimizer."""
    return len(list((checkpoint / "checkpoint").glob("*zero_pp_rank_*_optim_states.pt")))


def convert(checkpoint: Path) -> str:
    """Write the universal format beside a checkpoint, once; return what went wrong, or an empty string."""
    if (checkpoint / _WRITTEN_LAST).exists():
        return ""
    workers = str(max(1, min(8, (os.cpu_count() or 2) // 2)))
    options = ["--input_folder", str(checkpoint / "checkpoint"), "--output_folder", str(checkpoint / _FORMAT)]
    options += ["--num_extract_workers", workers, "--num_merge_workers", workers, "--inject_missing_state"]
    command = [sys.executable, "-c", f"from {__name__} import main; main()", *options]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        return f"{' '.join(command)}\n{result.stderr.strip()}"
    return ""


def main() -> None:
    """Run DeepSpeed's own conversion with the options of the command line, which reads as the process that began it."""
    from deepspeed.checkpoint import ds_to_universal

    from lightning_longnet.checkpointing.restricted import deepspeed_classes, restricted

    with restricted(*deepspeed_classes()):
        ds_to_universal.main(ds_to_universal.parse_arguments())
