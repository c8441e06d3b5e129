"""The formats of checkpoints that each sharding can load, and the error message for those of another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_longnet.checkpointing.manifest import form_of

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

_READERS = {"file": "'ddp', 'fsdp2', 'fsdp2_offload' or 'hsdp'", "fsdp2": "'fsdp2', 'fsdp2_offload' or 'hsdp'"}
_NAMES = {"file": "one file", "fsdp2": "a folder of FSDP2", "deepspeed": "a folder of DeepSpeed"}


def fault_of_form(path: Path, forms: Collection[str], sharding: str) -> str:
    """Return the error message for a checkpoint that a sharding cannot resume from, with the shardings that can.

    It is "" if the sharding can, if the path holds no known checkpoint, or if a DeepSpeed sharding is given a folder of
    DeepSpeed whose stage is unknown.  `CheckpointSaves.load_checkpoint` calls it on rank 0 for a local path, once the
    checkpoint is known to be undamaged.

    Args:
        path: the file or folder of the checkpoint.
        forms: the formats that the strategy loads: "file", "fsdp2" or "deepspeed".
        sharding: the argument of the strategy.
    """
    form = form_of(path)
    name, readers = _NAMES.get(form, ""), _READERS.get(form, "")
    if form == "deepspeed":
        # stages 1 and 2 keep whole parameters, in a file of the first name; stage 3 keeps parts in those of the second
        is_stage_1_or_2 = any(path.glob("*/mp_rank_*_model_states.pt"))
        is_known = is_stage_1_or_2 or any(path.glob("*/zero_pp_rank_*_model_states.pt"))
        if "deepspeed" in forms and (not is_known or is_stage_1_or_2 != ("stage_3" in sharding)):
            return ""
        name += "" if not is_known else "'s stage 1 or 2" if is_stage_1_or_2 else "'s stage 3"
        readers = "the stage of DeepSpeed that saved it"
        if is_known:
            readers = (
                "'deepspeed_stage_1' or 'deepspeed_stage_2', as it was saved"
                if is_stage_1_or_2
                else "'deepspeed_stage_3' or 'deepspeed_stage_3_offload'"
            )
    elif not form or form in forms:
        return ""
    return (
        f"the checkpoint {path} is {name}, which sharding={sharding!r} cannot go on from: take {readers}, or begin "
        f"with its weights alone, which read_checkpoint and LongNetModule(config, weights=...) take of any engine"
    )
