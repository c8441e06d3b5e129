"""Train a LongViT whose patches are split over processes: `python examples/longvit.py`.

Each image has two squares, and its class is the quarter with the brighter one, which a single patch does not determine.
For your own images use `ImageFolderData`, with a folder for each class.
"""

from __future__ import annotations

import argparse

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_longnet import LongViTConfig, LongViTModule, Pattern

SIZE, PATCH = 64, 8


class Squares(Dataset[dict[str, Tensor]]):
    """Images that are sampled with a seed that depends only on their index."""

    def __init__(self, many: int, seed: int) -> None:
        self.many, self.seed = many, seed

    def __len__(self) -> int:
        return self.many

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + i)
        pixels = 0.1 * torch.randn(1, SIZE, SIZE, generator=generator)
        quarters = torch.randperm(4, generator=generator)[:2].tolist()
        for brightness, quarter in zip((1.0, 0.5), quarters, strict=True):
            row, column = (torch.randint(SIZE // 2 - PATCH, (2,), generator=generator)).tolist()
            row, column = row + quarter // 2 * SIZE // 2, column + quarter % 2 * SIZE // 2
            pixels[:, row : row + PATCH, column : column + PATCH] += brightness
        return {"pixels": pixels, "label": torch.tensor(quarters[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2, help="processes that share the patches of each image")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    L.seed_everything(0)
    # no patch is first: what a segment shows is seen in both directions
    pattern = Pattern.dilated((16, 64), (1, 2))
    config = LongViTConfig(pattern, dim=64, layers=3, heads=4, classes=4, image_size=SIZE, patch_size=PATCH, channels=1)
    trainer = L.Trainer(
        strategy="ring_sequence_parallel_ddp",
        accelerator="cpu",
        devices=options.devices,
        max_steps=options.steps,
        max_epochs=-1,
        limit_val_batches=4,
        check_val_every_n_epoch=None,
        val_check_interval=options.steps,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        LongViTModule(config, learning_rate=2e-3),
        DataLoader(Squares(16_000, 1), batch_size=32, shuffle=True),
        DataLoader(Squares(256, 2), batch_size=64),
    )
    figures = trainer.callback_metrics
    trainer.print(
        f"of 4 quarters, {figures['val/accuracy'].item():.1%} are told rightly, by {options.devices} processes"
    )


if __name__ == "__main__":
    main()
