"""A kill at any operation on files of a save leaves the old checkpoint or the new one, with any engine."""

import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_training import FLOAT32
from tiers import tiered
from trained import adamw, fit, samples
from workers import free_port

from lightning_longnet import read_checkpoint
from lightning_longnet.checkpointing.newest import check_checkpoint, newest_checkpoint

sys.path.append(str(Path(__file__).parents[1] / "checkpointing"))
from kills import killed_ranks

SETTING = {**FLOAT32, "optimizer": adamw, "samples": samples(12), "accumulate": 1}


class Steps:
    """A run of a number of steps, which saves `last` and the newest step after each, and goes on where one was."""

    def __init__(self, sharding, background, steps):
        self.sharding, self.background, self.steps = sharding, background, steps
        self.port = free_port()

    def __call__(self, rank, world, folder):
        torch.set_num_threads(1)
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(self.port),
            LOCAL_RANK=str(rank),
            NODE_RANK="0",
            WORLD_SIZE=str(world),
        )
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=1, save_last=True)
        setting = {**SETTING, "micro_batches": 1, "epochs": self.steps}
        resume = "last" if any(folder.glob("*.ckpt")) else None
        options = {"split_check": "off", "background_saves": self.background}
        fit(rank, world, setting, self.sharding, world, resume, [saving], **options)


def states(folder):
    return {
        check_checkpoint(path).step: {name: x.clone() for name, x in read_checkpoint(path).state_dict.items()}
        for path in folder.glob("step=*.ckpt")
    }


STAGES = [f"deepspeed_stage_{stage}" for stage in (1, 2, 3)]
# (engine, saves in the background, ranks, the rank that is killed, at every so many operations)
CASES = {
    "fsdp2, every fifth": ("fsdp2", False, 1, 0, 5),
    "fsdp2, one rank": ("fsdp2", False, 1, 0, 1),
    "fsdp2, rank 0": ("fsdp2", False, 2, 0, 1),
    "fsdp2, rank 1": ("fsdp2", False, 2, 1, 1),
    "ddp": ("ddp", False, 1, 0, 1),
    **{engine: (engine, False, 1, 0, 1) for engine in STAGES},
    **{f"{engine}, rank 1": (engine, False, 2, 1, 1) for engine in STAGES[1:]},
    **{f"{engine}, background": (engine, True, 1, 0, 1) for engine in ("ddp", "fsdp2", *STAGES[1:])},
    "fsdp2, rank 1, background": ("fsdp2", True, 2, 1, 1),
}


@pytest.mark.parametrize("case", tiered(CASES, quick=[], full=[case for case in CASES if case != "fsdp2, every fifth"]))
def test_the_old_or_the_new_one_is_left(case, tmp_path):
    sharding, background, world, victim, every = CASES[case]
    base, folder = tmp_path / "base", tmp_path / "run"
    folder.mkdir()
    killed_ranks(folder, Steps(sharding, background, 1), world)
    right = states(folder)
    shutil.copytree(folder, base)
    operations = killed_ranks(folder, Steps(sharding, background, 2), world, victim)
    right |= states(folder)
    assert set(right) == {1, 2}
    result = []
    for number in range(every - 1, len(operations), every):
        shutil.rmtree(folder)
        shutil.copytree(base, folder)
        assert killed_ranks(folder, Steps(sharding, background, 2), world, victim, number), operations[number]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing that has a name may be damaged
            path = newest_checkpoint(folder, reads_all=True)
        step = check_checkpoint(path).step
        for name, x in read_checkpoint(path).state_dict.items():
            assert torch.equal(x, right[step][name]), operations[number]
        result.append(step)
    assert result == sorted(result)
    assert result[0] == 1
    if every == 1 and victim == 0:
        assert result[-1] == 2
