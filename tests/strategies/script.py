"""A program as users have it, started by whatever starts programs: `script.py '{"kind": "ddp", ...}'`.

Each rank writes its losses to a file of its own as soon as it has them.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader
from trained import Module, adamw, collated, quiet, samples, started

import lightning_longnet
from lightning_longnet.strategies import RingSequenceParallelStrategy
from lightning_longnet.strategies.ddp import DDPSequenceParallelStrategy


class Told(Module):
    def __init__(self, model, told):
        super().__init__(model, adamw)
        self.told = told

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        rank, number = self.global_rank, self.trainer.fit_loop.epoch_loop.total_batch_idx
        with (Path(self.told["folder"]) / f"losses-{rank}.txt").open("a") as file:
            file.write(f"{number} {loss.item()!r}\n")
        if [rank, number] == self.told.get("at"):
            os.kill(os.getpid(), getattr(signal, self.told["signal"]))
        time.sleep(self.told.get("pause", 0))
        return loss


def main():
    told = json.loads(sys.argv[1])
    os.environ.setdefault("PL_GLOBAL_SEED", "5")
    torch.set_num_threads(1)
    folder = Path(told["folder"])
    assert Path(lightning_longnet.__file__).parents[1] == Path(__file__).parents[2]
    if told.get("at") == ["connecting", int(os.environ.get("LOCAL_RANK", 0))]:
        DDPSequenceParallelStrategy.setup_environment = lambda _: os.kill(os.getpid(), signal.SIGTERM)
    trainer = L.Trainer(
        # without the split check, whose copies of the module would write losses, too
        strategy=RingSequenceParallelStrategy(
            sharding=told["kind"], timeout=told.get("timeout", 60), split_check="off"
        ),
        accelerator="cpu",
        devices=told.get("devices", 2),
        num_nodes=told.get("nodes", 1),
        max_steps=told.get("steps", 3),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    dtype = torch.float32 if "deepspeed" in told["kind"] else torch.float64
    model = started({"dropout": 0.2, "dtype": dtype})
    loader = DataLoader(samples(64), batch_size=4, collate_fn=collated)
    with quiet():
        trainer.fit(Told(model, told), loader, ckpt_path=told.get("resume"))


if __name__ == "__main__":
    main()
