"""A program as users have it, started by whatever starts programs: `script.py '{"kind": "ddp", ...}'`.

Each rank writes its losses to a separate file as soon as it has them.
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


class ScriptModule(Module):
    def __init__(self, model, options):
        super().__init__(model, adamw)
        self.options = options

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        rank, number = self.global_rank, self.trainer.fit_loop.epoch_loop.total_batch_idx
        with (Path(self.options["folder"]) / f"losses-{rank}.txt").open("a") as file:
            file.write(f"{number} {loss.item()!r}\n")
        if [rank, number] == self.options.get("at"):
            os.kill(os.getpid(), getattr(signal, self.options["signal"]))
        time.sleep(self.options.get("pause", 0))
        return loss


def main():
    options = json.loads(sys.argv[1])
    os.environ.setdefault("PL_GLOBAL_SEED", "5")
    torch.set_num_threads(1)
    folder = Path(options["folder"])
    assert Path(lightning_longnet.__file__).parents[1] == Path(__file__).parents[2]
    if options.get("at") == ["connecting", int(os.environ.get("LOCAL_RANK", 0))]:
        DDPSequenceParallelStrategy.setup_environment = lambda _: os.kill(os.getpid(), signal.SIGTERM)
    trainer = L.Trainer(
        # without the split check, whose copies of the module would write losses, too
        strategy=RingSequenceParallelStrategy(
            sharding=options["kind"], timeout=options.get("timeout", 60), split_check="off"
        ),
        accelerator="cpu",
        devices=options.get("devices", 2),
        num_nodes=options.get("nodes", 1),
        max_steps=options.get("steps", 3),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    dtype = torch.float32 if "deepspeed" in options["kind"] else torch.float64
    model = started({"dropout": 0.2, "dtype": dtype})
    loader = DataLoader(samples(64), batch_size=4, collate_fn=collated)
    with quiet():
        trainer.fit(ScriptModule(model, options), loader, ckpt_path=options.get("resume"))


if __name__ == "__main__":
    main()
