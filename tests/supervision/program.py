"""A small run whose ranks fail on demand: `program.py '{"folder": ..., "fault": "abort", "rank": 1, "phase": "save"}'`.

Each rank writes its losses to a file of its own as soon as it has them.
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_longnet import DilatedSelfAttention, Pattern, sequence_context
from lightning_longnet.strategies import RingSequenceParallelStrategy

STEP = 3  # the number of complete steps at which a fault happens
FAULTS = {
    "exception": lambda: _raise(),
    "exit 0": lambda: sys.exit(0),
    "exit 3": lambda: sys.exit(3),
    "abort": os.abort,
    "segfault": lambda: ctypes.string_at(0),
    **{name: lambda name=name: os.kill(os.getpid(), getattr(signal, name)) for name in
       ("SIGINT", "SIGTERM", "SIGKILL", "SIGSTOP")},
    "endless loop": lambda: _spin(),
    "GIL held": lambda: ctypes.PyDLL(None).sleep(10**6),
}  # fmt: skip
PHASES = ("forward", "backward", "validation", "save", "load")


def _raise():
    raise OSError("the disk is gone")


def _spin():
    while True:
        pass


class Failing(L.LightningModule):
    def __init__(self, options):
        super().__init__()
        self.options = options
        self.embedding = torch.nn.Embedding(19, 8)
        self.blocks = torch.nn.ModuleList([Block()])
        self.head = torch.nn.Linear(8, 19)

    def fail(self, phase):
        """Fail here, once in the life of a run, if this is the place."""
        options = self.options
        ranks = options.get("ranks", [options.get("rank")])
        if options.get("phase") != phase or self.global_rank not in ranks or self.trainer.sanity_checking:
            return
        if phase != "load" and self.trainer.global_step < options.get("step", STEP):
            return
        done = Path(options["folder"]) / "failed"
        if done.exists() and not options.get("again") and "ranks" not in options:
            return
        done.touch()
        FAULTS[options["fault"]]()

    def training_step(self, batch, batch_idx):
        self.fail("forward")
        x = self.embedding(batch["input_ids"])
        for block in self.blocks:
            x = block(x)
        x.register_hook(lambda _: self.fail("backward"))
        logits = self.head(x)
        losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        loss = sequence_context(self).token_mean(losses, batch["labels"].numel())
        with (Path(self.options["folder"]) / f"losses-{self.global_rank}.txt").open("a") as file:
            file.write(f"{self.trainer.global_step} {loss.item()!r}\n")
        time.sleep(self.options.get("pause", 0))
        return loss

    def validation_step(self, batch, batch_idx):
        self.fail("validation")
        self.embedding(batch["input_ids"])

    def on_save_checkpoint(self, checkpoint):
        self.fail("save")

    def on_load_checkpoint(self, checkpoint):
        self.fail("load")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = DilatedSelfAttention(8, 2, Pattern.dilated((8, 16), (1, 2), is_causal=True))

    def forward(self, x):
        return x + self.attention(x)


class Saved(L.Callback):
    """The parameters at the end."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def on_train_end(self, trainer, module):
        values = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in module.named_parameters()}
        if trainer.is_global_zero:
            torch.save({name: x.detach().clone() for name, x in values.items()}, self.folder / "parameters.pt")


def samples():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(19, (64, 33), generator=generator)
    return [{"input_ids": row[:-1], "labels": row[1:]} for row in rows]


def main():
    options = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    L.seed_everything(5, verbose=False)
    folder = Path(options["folder"])
    trainer = L.Trainer(
        strategy=RingSequenceParallelStrategy(
            options.get("size"),
            sharding=options.get("kind", "ddp"),
            timeout=options.get("timeout", 120),
            split_check="off",
        ),
        accelerator="cpu",
        devices=options.get("devices", 2),
        max_steps=options.get("steps", 6),
        val_check_interval=2,
        limit_val_batches=2,
        num_sanity_val_steps=0,
        callbacks=[
            ModelCheckpoint(folder, "{step}", every_n_train_steps=options.get("every", 2), save_top_k=-1),
            Saved(folder),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    loader = DataLoader(samples(), batch_size=2)
    trainer.fit(Failing(options), loader, DataLoader(samples()[:4], batch_size=2), ckpt_path=options.get("resume"))


if __name__ == "__main__":
    main()
