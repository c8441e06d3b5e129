"""The checkpoints that an engine reads, and the error for those of another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_longnet.checkpointing.manifest import form_of

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

_READERS = {"file": "'ddp', 'fsdp2' or 'hsdp'", "fsdp2": "'fsdp2' or 'hsdp'"}
_NAMES = {"file": "one file", "fsdp2": "a folder of FSDP2", "deepspeed": "a folder of DeepSpeed"}


def fault_of_form(path: Path, forms: Collection[str], sharding: str) -> str:
    """Return why an engine cannot go on from a checkpoint, and which engine can, for an error; "" if it can.

    Args:
        path: the checkpoint.
        forms: the forms of checkpoints that the engine reads: "file", "fsdp2" or "deepspeed".
        sharding: the engine.
    """
    form = form_of(path)
    name, readers = _NAMES.get(form, ""), _READERS.get(form, "")
    if form == "deepspeed":
        # stages 1 and 2 keep whole parameters, in a file of the first name; stage 3 keeps parts in those of the second
        is_whole = any(path.glob("*/mp_rank_*_model_states.pt"))
        is_known = is_whole or any(path.glob("*/zero_pp_rank_*_model_states.pt"))
        if "deepspeed" in forms and (not is_known or is_whole != ("stage_3" in sharding)):
            return ""
        name += "" if not is_known else "'s stage 1 or 2" if is_whole else "'s stage 3"
        readers = "the stage of DeepSpeed that saved it"
        if is_known:
            readers = (
                "'deepspeed_stage_1' or 'deepspeed_stage_2', as it was saved" if is_whole else "'deepspeed_stage_3'"
            )
    elif not form or form in forms:
        return ""
    return (
        f"the checkpoint {path} is {name}, which sharding={sharding!r} cannot go on from: take {readers}, or begin "
        f"with its weights alone, which read_checkpoint and LongNetModule(config, weights=...) take of any engine"
    )
