"""A callback for `longnet fit`: SIGKILL for one rank, once in the life of a run."""

import os
import signal
from pathlib import Path

import lightning as L


class KillOnce(L.Callback):
    def __init__(self, rank: int, step: int, mark: str):
        self.rank, self.step, self.mark = rank, step, Path(mark)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step) and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
