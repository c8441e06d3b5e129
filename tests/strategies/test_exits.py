"""A process on gloo ends well, although a thread of torch still has a tensor to release."""

import subprocess
import sys

import pytest
from launched import environment

SCRIPT = """
import sys, time
import lightning as L
import torch
import torch.distributed as dist
from lightning_longnet.strategies import RingSequenceParallelStrategy
from lightning.pytorch.demos.boring_classes import BoringModel

class Model(BoringModel):
    sequence_dims = {"batch": None}

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


@pytest.mark.long
def test_a_message_before_the_end_of_the_process(tmp_path):
    (tmp_path / "program.py").write_text(SCRIPT)
    command = [sys.executable, "program.py"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment())
    assert ended.returncode == 0, ended.stderr
