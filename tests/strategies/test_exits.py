"""A process on gloo ends well, although a thread of torch still has a tensor to release, and says where a crash was."""

import re
import subprocess
import sys
from signal import SIGABRT

import pytest
from launched import environment

SCRIPT = """
import os, sys, time
import lightning as L
import torch
import torch.distributed as dist
from lightning_longnet.strategies import RingSequenceParallelStrategy
from lightning.pytorch.demos.boring_classes import BoringModel

class Model(BoringModel):
    sequence_dims = {"batch": None}

    def on_validation_end(self):
        if "abort" in sys.argv:
            os.abort()

trainer = L.Trainer(
    strategy=RingSequenceParallelStrategy(sequence_parallel_size=1, sharding="ddp", split_check="off"),
    accelerator="cpu", devices=2, fast_dev_run=True, logger=False,
    enable_progress_bar=False, enable_model_summary=False,
)
trainer.validate(Model(), verbose=False)
trainer.strategy.barrier()
sys.setswitchinterval(1000)  # the thread that has the message asks for the interpreter's lock and does not get it
dist.all_reduce(torch.ones(3), async_op=True)
end = time.monotonic() + 1
while time.monotonic() < end:
    pass
"""


@pytest.mark.full
def test_a_message_before_the_end_of_the_process(tmp_path):
    ended = run(tmp_path)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.full
def test_a_rank_that_a_signal_ends_prints_its_stacks(tmp_path):
    ended = run(tmp_path, "abort")
    assert ended.returncode == -SIGABRT
    assert "Fatal Python error: Aborted" in ended.stderr
    assert re.search(r'File ".*program.py", line \d+ in on_validation_end', ended.stderr), ended.stderr


def run(folder, *words):
    (folder / "program.py").write_text(SCRIPT)
    command = [sys.executable, "program.py", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=environment())
