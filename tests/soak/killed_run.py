"""A run whose ranks get SIGKILL at drawn times, or in the place of a drawn operation on files of a save.

A rank writes its pid and the loss of each step as soon as it has it, and how many operations each of its saves takes.
"""

import json
import os
import sys
import time
from pathlib import Path

import lightning as L
import torch
from kills import OPERATIONS, install
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from trained import SMALL_BUCKETS, KeepParameters, Model, Module, adamw, collated, samples, trainer_of

from lightning_longnet.strategies import RingSequenceParallelStrategy

RANKS = 2
EVERY = 2  # steps between saves
PAUSE = 0.05  # seconds of a step at least, so that kills at a time find steps as well as saves


class Killed(Module):
    def __init__(self, options):
        super().__init__(Model(dropout=0.1), adamw)
        self.options, self.folder, self.saves = options, Path(options["folder"]), {}

    def on_save_checkpoint(self, checkpoint):
        """Begin to count the operations of the first save of this step, and of what follows it."""
        step = self.trainer.global_step
        if step in self.saves:
            return
        self.keep_operations()
        self.saves[step] = 0
        at = mark = None
        for number, (rank, save, operation) in enumerate(self.options["kills"]):
            path = self.folder / f"killed-{number}"
            if (rank, save) == (self.global_rank, step) and not path.exists():
                at, mark = operation, path
        OPERATIONS.begin(self.folder / "checkpoints", at, mark)

    def keep_operations(self):
        if self.saves:
            self.saves[max(self.saves)] = len(OPERATIONS.names)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        with (self.folder / f"losses-{self.global_rank}.txt").open("a") as file:
            file.write(f"{self.trainer.global_step} {loss.item()!r} {time.time()}\n")
        time.sleep(PAUSE)
        return loss

    def validation_step(self, batch, batch_idx):
        self.model(batch)


def main():
    options = json.loads(sys.argv[1])
    folder, engine = Path(options["folder"]), options["engine"]
    (folder / f"pid-{os.environ.get('LOCAL_RANK', 0)}").write_text(str(os.getpid()))
    torch.set_num_threads(1)
    L.seed_everything(5, verbose=False)
    install()
    module, kept = Killed(options), KeepParameters()
    trainer = trainer_of(
        RingSequenceParallelStrategy(
            sharding=engine,
            timeout=120,
            split_check="off",
            background_saves=options["background"],
            engine=SMALL_BUCKETS if engine.startswith("deepspeed") else None,
        ),
        RANKS,
        max_steps=options["steps"],
        max_epochs=-1,
        val_check_interval=3,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        enable_checkpointing=True,
        default_root_dir=folder,
        callbacks=[
            ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=EVERY, save_top_k=1, save_last=True),
            kept,
        ],
    )
    rows = DataLoader(samples(12), batch_size=1, collate_fn=collated, shuffle=True)
    trainer.fit(module, rows, DataLoader(samples(4), batch_size=1, collate_fn=collated))
    module.keep_operations()
    (folder / f"operations-{trainer.global_rank}.json").write_text(json.dumps(module.saves))
    if trainer.is_global_zero:
        torch.save(kept.parameters, folder / "parameters.pt")
