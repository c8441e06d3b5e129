"""DeepSpeed's checkpoints for another number of ranks: its universal format, made on the way."""

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
    """How many ranks wrote it; 0 where it holds no optimiser."""
    return len(list((checkpoint / "checkpoint").glob("*zero_pp_rank_*_optim_states.pt")))


def convert(checkpoint: Path) -> str:
    """Lay the universal format beside what is there, once.  What went wrong, or nothing."""
    if (checkpoint / _WRITTEN_LAST).exists():
        return ""
    workers = str(max(1, min(8, (os.cpu_count() or 2) // 2)))
    told = ["--input_folder", str(checkpoint / "checkpoint"), "--output_folder", str(checkpoint / _FORMAT)]
    told += ["--num_extract_workers", workers, "--num_merge_workers", workers, "--inject_missing_state"]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *told]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        return f"{' '.join(command)}\n{found.stderr.strip()}"
    return ""
