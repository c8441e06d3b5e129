"""`longnet fit --restarts`: a rank of a training is killed, and the run ends as one that nobody disturbed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from supervised import PATIENCE, ROOT, environment
from tiers import tiered

from lightning_longnet import read_checkpoint
from lightning_longnet.checkpointing.newest import check_checkpoint

STEPS = 8
STRATEGIES = ["ring_sequence_parallel", "ring_sequence_parallel_deepspeed_stage_2"]
SMALL = [
    *(f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=3", "--trainer.limit_val_batches=1"),
    *("--trainer.num_sanity_val_steps=0", "--model.config.dim=16", "--model.config.layers=1"),
    *("--model.config.heads=2", "--model.config.attention_dropout=0.1", "--data.tokens=256", "--data.megabytes=0.05"),
]
SAVING = {"every_n_train_steps": 2, "filename": "{step}", "save_top_k": -1}


def fit(folder, strategy, killed):
    """(status, lines) of a run that saves in a folder, a rank of which is killed in step 5."""
    callbacks = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": SAVING}]
    if killed:
        where = {"rank": 1, "step": 5, "mark": str(folder / "killed")}
        callbacks.append({"class_path": "kill_once.KillOnce", "init_args": where})
    words = ["fit", "--config", str(ROOT / "configs/quickstart.yaml"), "--restarts", "2", *SMALL]
    words += ["--trainer.strategy", strategy, "--trainer.callbacks", json.dumps(callbacks)]
    folder.mkdir()
    path = f"{ROOT}:{Path(__file__).parent}"
    result = subprocess.run(
        [sys.executable, "-m", "lightning_longnet", *words], capture_output=True, text=True, cwd=folder,
        timeout=PATIENCE, env=environment(PYTHONPATH=path),
    )  # fmt: skip
    return result.returncode, result.stderr.splitlines()


def last(folder):
    (path,) = folder.rglob(f"step={STEPS}.ckpt")
    assert check_checkpoint(path).step == STEPS
    return read_checkpoint(path).state_dict


@pytest.mark.parametrize("strategy", tiered(STRATEGIES, quick=[], long=[]))
def test_a_training_whose_rank_is_killed_ends_as_another(tmp_path, strategy):
    for killed in (False, True):
        status, lines = fit(tmp_path / str(killed), strategy, killed)
        assert status == 0, "\n".join(lines[-40:])
        said = [line for line in lines if line.startswith("supervise: rank 1 was ended by SIGKILL")]
        assert len(said) == killed, "\n".join(lines[-40:])
    assert any("restart 1 of 2" in line for line in said)
    right, result = last(tmp_path / "False"), last(tmp_path / "True")
    assert right.keys() == result.keys()
    assert all(torch.equal(right[name], result[name]) for name in right)
