"""A small byte-level language model whose sequences are split over ranks, on whatever starts them.

    python examples/slurm/train.py --devices 2                 # two processes of this machine
    torchrun --nproc-per-node=2 examples/slurm/train.py --devices 2
    sbatch examples/slurm/train.sbatch                         # two nodes, see there

It trains on the sources of Python's standard library, on GPUs where there are any, and prints each step's loss.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_longnet import DilatedSelfAttention, FeedForward, Pattern, sequence_context
from lightning_longnet.registration import NAMES
from lightning_longnet.strategies import RingSequenceParallelStrategy


class Sources(Dataset[dict[str, Tensor]]):
    """Pieces of the standard library: `tokens` bytes, and for each the byte that follows it."""

    def __init__(self, tokens: int, megabytes: float = 1.0) -> None:
        text = bytearray()
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            text += path.read_bytes()
        self.stream = torch.frombuffer(text[: int(megabytes * 2**20)], dtype=torch.uint8)
        self.tokens = tokens

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.tokens

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        piece = self.stream[i * self.tokens : (i + 1) * self.tokens + 1].long()
        return {"input_ids": piece[:-1], "labels": piece[1:]}


class Block(nn.Module):
    def __init__(self, dim: int, pattern: Pattern, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = DilatedSelfAttention(dim, dim // 16, pattern, dropout=dropout)
        self.feed_forward = nn.Sequential(nn.LayerNorm(dim), FeedForward(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        out: Tensor = x + self.feed_forward(x)
        return out


class ByteModel(L.LightningModule):
    """Each rank is given its part of a batch; layers and the loss see to the rest."""

    def __init__(self, tokens: int, dim: int, layers: int, dropout: float, pause: float) -> None:
        super().__init__()
        self.pause = pause
        pattern = Pattern.dilated((tokens // 8, tokens // 2, tokens), (1, 4, 8), is_causal=True)
        self.embed = nn.Embedding(256, dim)
        self.blocks = nn.ModuleList([Block(dim, pattern, dropout) for _ in range(layers)])
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 256))

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        x = self.embed(batch["input_ids"])
        for block in self.blocks:
            x = block(x)
        labels = batch["labels"]
        loss_sum = F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), reduction="sum")
        loss = sequence_context(self).token_mean(loss_sum, labels.numel())
        self.print(f"step {self.global_step}: loss {loss.item():.7f}", flush=True)
        time.sleep(self.pause)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", default="runs", help="for checkpoints; all nodes must see it")
    parser.add_argument("--sharding", choices=sorted(set(NAMES.values())), default="fsdp2")
    parser.add_argument("--sequence-parallel-size", type=int, help="ranks that share a sequence; all by default")
    parser.add_argument("--tokens", type=int, default=4096, help="bytes of a sequence, at least 8")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences of each group of ranks in a step")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds in each step, to try signals out")
    # what SLURM was asked for is what the Trainer must be told
    parser.add_argument("--nodes", type=int, default=int(os.environ.get("SLURM_NNODES", 1)))
    parser.add_argument("--devices", type=int, default=int(os.environ.get("SLURM_NTASKS_PER_NODE", 1)))
    parser.add_argument("--accelerator", default="auto")
    return parser.parse_args()


def main() -> None:
    told = arguments()
    L.seed_everything(0)
    settings: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        strategy=RingSequenceParallelStrategy(told.sequence_parallel_size, told.sharding),
        accelerator=told.accelerator,
        num_nodes=told.nodes,
        devices=told.devices,
        max_steps=told.steps,
        default_root_dir=told.folder,
        enable_checkpointing=False,  # what Preemption saves is all that this run needs
        **settings,
    )
    model = ByteModel(told.tokens, told.dim, told.layers, told.dropout, told.pause)
    trainer.fit(model, DataLoader(Sources(told.tokens), told.batch_size, shuffle=True))
    trainer.print("done", flush=True)


if __name__ == "__main__":
    main()
