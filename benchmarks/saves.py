"""Measure how long a step waits for a checkpoint, beside Lightning's own saving by the same engine.

    python benchmarks/saves.py
    python benchmarks/saves.py --table            # the committed result

Two processes of one thread each save checkpoints with `Trainer.save_checkpoint`, alternately in Lightning's way, in
that followed by an fsync of the files and folders, in ours, in ours without the checksum of the content, and in ours in
the background, each into a file or folder of its own that is replaced every time.  Before each save the disk has
written what earlier ones left.  Lightning's way with ddp does not wait for the disk and computes no checksum that
anything reads; ours waits, writes a manifest and moves the pointer; in the background it waits for the copy alone.  So
the column "Lightning + fsync" is the one that ours compares with: both return when the disk holds the checkpoint.
"Ours without checksums" shows how much longer a step waits because of them.  Ratios are medians over pairs of saves of
the same round.  Sizes: the model of the quickstart with AdamW, and linear layers of 200 MB without optimizer state.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import lightning as L
import torch
import torch.distributed as dist
from callbacks import Model
from comparison import Rows
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from machine import described, run
from ranks import on_ranks
from torch import nn
from torch.utils.data import DataLoader

from lightning_longnet.checkpointing import streams
from lightning_longnet.checkpointing.checkpoint_io import ManifestCheckpointIO
from lightning_longnet.strategies import RingSequenceParallelStrategy

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.strategies.engines import Sharding

RANKS, LARGE, LAYERS = 2, 2048, 12
RESULT = Path(__file__).parent / "results" / "saves-cpu.json"
SYNCED, UNSUMMED = "lightning-fsync", "ours-without-checksum"
NAMES = {
    "lightning": "Lightning's way",
    SYNCED: "Lightning + fsync",
    "ours": "ours",
    UNSUMMED: "ours without checksums",
    "background": "ours in the background",
}
KINDS = tuple(NAMES)
BASELINES = {"lightning": "Lightning's", SYNCED: "Lightning + fsync", UNSUMMED: "without checksums"}
STOCK: dict[Sharding, Any] = {"ddp": Strategy, "fsdp2": ModelParallelStrategy}


class Unsummed:
    """Stands for zlib where a save computes no checksum of its content."""

    @staticmethod
    def crc32(content: Any, value: int = 0) -> int:
        return value


class Layers(L.LightningModule):
    """Linear layers whose weights are 200 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(LARGE, LARGE, bias=False)) for _ in range(LAYERS))

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        x = batch["input_ids"][:, :LARGE].float() / 256
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


class Saves(L.Callback):
    """Saves alternately in both ways after the first step."""

    def __init__(self, folder: str, sharding: Sharding, rounds: int) -> None:
        self.folder, self.stock, self.rounds = folder, STOCK[sharding], rounds
        self.seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.bytes = 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        strategy: Any = trainer.strategy
        for turn in range(self.rounds + 1):
            for kind in KINDS if turn % 2 else KINDS[::-1]:
                if kind in ("lightning", SYNCED):
                    strategy.background_saves = False
                    strategy._checkpoint_io = TorchCheckpointIO()
                    strategy.save_checkpoint = self.stock.save_checkpoint.__get__(strategy)
                else:
                    strategy.background_saves = kind == "background"
                    strategy._checkpoint_io = ManifestCheckpointIO(background=kind == "background")
                    strategy.__dict__.pop("save_checkpoint", None)
                path = Path(self.folder, f"{kind}.ckpt")
                if trainer.is_global_zero:
                    os.sync()
                strategy.barrier()
                begin = perf_counter()
                with patch.object(streams, "zlib", Unsummed) if kind == UNSUMMED else nullcontext():
                    trainer.save_checkpoint(path)
                if kind == SYNCED:
                    sync(path, trainer.global_rank)
                    strategy.barrier()  # as ours: no rank goes on before the disk holds all files
                if turn:  # the first ones create what the others replace
                    self.seconds[kind].append(round(perf_counter() - begin, 5))
                strategy.settle_saves()
        self.bytes = sum(each.stat().st_size for each in files_of(path))


def files_of(path: Path) -> list[Path]:
    """Return the files of a checkpoint, which is a file or a folder."""
    return [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())


def sync(path: Path, rank: int) -> None:
    """Let the disk write a rank's share of the files of a checkpoint, and on rank 0 the names of all."""
    folders = [each for each in (path, *path.rglob("*")) if each.is_dir()] + [path.parent]
    for each in [*files_of(path)[rank::RANKS], *(folders if rank == 0 else [])]:
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def work(rounds: int, folder: str, sharding: Sharding, size: str) -> dict[str, Any]:
    torch.manual_seed(0)
    saves = Saves(folder, sharding, rounds)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=RingSequenceParallelStrategy(
            RANKS if size == "quickstart" else 1, sharding=sharding, split_check="off"
        ),
        max_steps=1,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saves],
    )
    trainer.fit(Model() if size == "quickstart" else Layers(), DataLoader(Rows(), batch_size=1))
    dist.barrier()
    return {"seconds": saves.seconds, "bytes": saves.bytes}


def measured(rounds: int) -> dict[str, Any]:
    load = os.getloadavg()[0]
    rows = []
    for sharding in STOCK:
        for size in ("quickstart", "200 MB"):
            with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
                rows.append(
                    {"sharding": sharding, "size": size, **on_ranks(RANKS, work, rounds, folder, sharding, size)}
                )
    return {"machine": described("cpu"), "load_before": round(load, 2), "rounds": rounds, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Return the medians; a result from before a way of saving was measured has no columns for it."""
    kinds = [kind for kind in KINDS if all(kind in row["seconds"] for row in result["rows"])]
    baselines = [kind for kind in BASELINES if kind in kinds]
    heads = ["engine", "checkpoint", *(NAMES[kind] for kind in kinds if kind != "background")]
    heads += [*(f"ours, over {BASELINES[kind]}" for kind in baselines), NAMES["background"]]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in result["rows"]:
        times = {kind: f"{statistics.median(row['seconds'][kind]) * 1e3:.0f} ms" for kind in kinds}
        columns = [row["sharding"], f"{row['size']}: {row['bytes'] / 1e6:.0f} MB"]
        columns += [times[kind] for kind in kinds if kind != "background"]
        for kind in baselines:
            pairs = zip(row["seconds"]["ours"], row["seconds"][kind], strict=True)
            columns.append(f"{statistics.median(a / b for a, b in pairs):.2f}")
        lines.append(f"| {' | '.join([*columns, times['background']])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(__doc__, RESULT, measured, table, rounds=10)  # --rounds, --table
