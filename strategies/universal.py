"""Conversion of DeepSpeed's checkpoints to its universal format, which any number of ranks can load."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from lightning_longnet.checkpointing.commit import discard
from lightning_longnet.checkpointing.manifest import (
    DamageError,
    Manifest,
    check_file_sizes,
    check_sums,
    files_of,
    parse,
    sum_of,
)
from lightning_longnet.trust import VARIABLE

if TYPE_CHECKING:
    from pathlib import Path

_FORMAT = "checkpoint_universal"
_WRITTEN_LAST = "latest_universal"
_SUMS = "checkpoint_universal.json"  # the manifest of the format, beside it


def saved_ranks(checkpoint: Path) -> int:
    """Return the number of ranks that saved a checkpoint of DeepSpeed, or 0 if it holds no optimizer states.

    `DeepSpeedSequenceParallelStrategy._load` asks, and converts a checkpoint of another number of ranks.
    """
    return len(list((checkpoint / "checkpoint").glob("*zero_pp_rank_*_optim_states.pt")))


def convert(checkpoint: Path, trust: bool = False) -> str:
    """Write the universal format of a checkpoint into its folder, if it is not there; return the error message, or "".

    `DeepSpeedSequenceParallelStrategy._load` calls it on rank 0 while the other ranks wait, when another number of
    ranks saved the checkpoint.

    Args:
        checkpoint: a folder that DeepSpeed saved.
        trust: runs the code that its files may hold.
    """
    try:
        return _convert(checkpoint, trust)
    except OSError as error:  # a folder that cannot be written, a full disk: the other ranks wait
        return str(error)


def _convert(checkpoint: Path, trust: bool) -> str:
    """Run DeepSpeed's conversion in another process, and write a manifest of its files; return the message, or ""."""
    if _is_converted(checkpoint):
        return ""
    for name in (_WRITTEN_LAST, _SUMS, _FORMAT):  # files of a conversion that was killed, or is damaged
        discard(checkpoint / name)
    workers = str(max(1, min(8, (os.cpu_count() or 2) // 2)))
    options = ["--input_folder", str(checkpoint / "checkpoint"), "--output_folder", str(checkpoint / _FORMAT)]
    options += ["--num_extract_workers", workers, "--num_merge_workers", workers, "--inject_missing_state"]
    command = [sys.executable, "-c", f"from {__name__} import main; main()", *options]
    environment = os.environ | ({VARIABLE: "1"} if trust else {})
    result = subprocess.run(command, capture_output=True, text=True, env=environment)  # runs `main` below
    if result.returncode:
        return f"{' '.join(command)}\n{result.stderr.strip()}"
    folder = checkpoint / _FORMAT
    sums = {name: sum_of(folder / name) for name in files_of(folder)}
    manifest = Manifest(_FORMAT, time.time_ns(), "", 0, 0, True, "universal", "deepspeed", 0, files=sums)
    (checkpoint / _SUMS).write_text(manifest.text())
    return ""


def _is_converted(checkpoint: Path) -> bool:
    """Return whether the folder of a checkpoint holds its universal format, complete and undamaged."""
    if not (checkpoint / _WRITTEN_LAST).is_file() or not (checkpoint / _SUMS).is_file():
        return False
    try:
        manifest = parse((checkpoint / _SUMS).read_bytes(), _SUMS)
        check_file_sizes(checkpoint / _FORMAT, manifest)
        check_sums(checkpoint / _FORMAT, manifest)
    except DamageError:
        return False
    return True


def main() -> None:
    """Run DeepSpeed's own conversion with the options of the command line, in the process that `_convert` starts.

    As in the process that started it, files may hold no other classes than DeepSpeed's, unless the user trusts them.
    """
    from deepspeed.checkpoint import ds_to_universal

    from lightning_longnet.checkpointing.restricted import deepspeed_classes, restricted

    with restricted(*deepspeed_classes()):
        ds_to_universal.main(ds_to_universal.parse_arguments())
