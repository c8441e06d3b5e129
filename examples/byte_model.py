"""A small byte-level language model of our layers, trained on Python's own standard library, on CPU.

Two processes share each sequence: `configs/quickstart.yaml` says `strategy: ring_sequence_parallel`.  The model below
knows nothing of that but for its loss, which is a mean over the tokens of all processes.

    python examples/byte_model.py fit --config configs/quickstart.yaml
    python examples/byte_model.py fit --config configs/quickstart.yaml --trainer.max_steps 30 --model.layers 2

Everything stands in this file, to be read and changed: the data, the model, and the LightningModule that trains it.
"""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_longnet import DilatedSelfAttention, FeedForward, Pattern, magneto_gain, sequence_context


class Windows(Dataset[dict[str, Tensor]]):
    """Pieces of a byte stream: `tokens` bytes, and for each the byte that follows it."""

    def __init__(self, stream: Tensor, tokens: int) -> None:
        if len(stream) <= tokens:
            raise ValueError(f"tokens must be less than the {len(stream):,} bytes of text, got {tokens:,}")
        self.stream, self.tokens = stream, tokens

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.tokens

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        piece = self.stream[i * self.tokens : (i + 1) * self.tokens + 1].long()
        return {"input_ids": piece[:-1], "labels": piece[1:]}


class SourceCode(L.LightningDataModule):
    """The Python files of a folder as one stream of bytes; the last twentieth is kept for validation.

    Args:
        folder: where to look for *.py files; the standard library of the running Python by default.
        tokens: bytes in a sequence.
        batch_size: sequences in a step.
        megabytes: how much text to read at most.
    """

    def __init__(
        self, folder: str | None = None, tokens: int = 4096, batch_size: int = 1, megabytes: float = 8.0
    ) -> None:
        super().__init__()
        self.folder = Path(folder or sysconfig.get_path("stdlib"))
        self.tokens, self.batch_size, self.megabytes = tokens, batch_size, megabytes

    def setup(self, stage: str) -> None:
        text = bytearray()
        for path in sorted(self.folder.glob("*.py")) + sorted(self.folder.glob("*/*.py")):
            text += path.read_bytes()
        if not text:
            raise ValueError(f"folder must hold *.py files, found none in {self.folder}")
        stream = torch.frombuffer(text[: int(self.megabytes * 2**20)], dtype=torch.uint8)
        cut = len(stream) - len(stream) // 20
        self.train, self.val = Windows(stream[:cut], self.tokens), Windows(stream[cut:], self.tokens)
        share = torch.bincount(stream[cut:].int(), minlength=256) / (len(stream) - cut)
        self.unigram_bits = -(share * share.clamp_min(1e-12).log2()).sum().item()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, self.batch_size)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, pattern: Pattern, gain: float) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            nn.LayerNorm(dim), DilatedSelfAttention(dim, heads, pattern, sub_norm=True, gain=gain)
        )
        self.feed_forward = nn.Sequential(nn.LayerNorm(dim), FeedForward(dim, sub_norm=True, gain=gain))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        out: Tensor = x + self.feed_forward(x)
        return out


class ByteModel(L.LightningModule):
    """Predicts each byte from those before it.

    Args:
        pattern: what a byte may see; every branch must be causal.
        dim: width of the model.
        layers: how many blocks.
        heads: attention heads in each.
        learning_rate: at its peak, after a tenth of the steps.
    """

    def __init__(
        self,
        pattern: Pattern,
        dim: int = 128,
        layers: int = 4,
        heads: int = 4,
        learning_rate: float = 2e-3,
    ) -> None:
        super().__init__()
        if not pattern.is_causal:
            raise ValueError(f"pattern must be causal in every branch, got {pattern}")
        self.learning_rate = learning_rate
        self.embed = nn.Embedding(256, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, pattern, magneto_gain(layers)) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 256))
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.embed(tokens)))
        return logits

    def bits_per_byte(self, batch: dict[str, Tensor]) -> Tensor:
        """Over the tokens of all processes: each has a part of the sequence."""
        labels = batch["labels"]
        nats = F.cross_entropy(self(batch["input_ids"]).flatten(0, 1), labels.flatten(), reduction="sum")
        return sequence_context(self).token_mean(nats, labels.numel()) / math.log(2)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        bits = self.bits_per_byte(batch)
        self.log("train/bits_per_byte", bits, prog_bar=True)
        return bits

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.log("val/bits_per_byte", self.bits_per_byte(batch), prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps, pct_start=0.1)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_fit_end(self) -> None:
        if not self.trainer.is_global_zero:
            return
        if "val/bits_per_byte" not in self.trainer.callback_metrics:
            print("\nNo validation ran: val_check_interval is larger than max_steps.")
            return
        found = self.trainer.callback_metrics["val/bits_per_byte"].item()
        data: SourceCode = self.trainer.datamodule  # type: ignore[attr-defined]
        print(f"\nValidation: {found:.3f} bits per byte; byte frequencies alone give {data.unigram_bits:.3f}.")
        print("Next: change the pattern in configs/quickstart.yaml, or read examples/byte_model.py.")


if __name__ == "__main__":
    LightningCLI(ByteModel, SourceCode, seed_everything_default=0)
