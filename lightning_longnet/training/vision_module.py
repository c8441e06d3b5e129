"""`LongViTModule`: a LightningModule that trains a LongViT to classify images."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from lightning_longnet.checkpointing.exports import config_of
from lightning_longnet.layers.options import probability
from lightning_longnet.models.longvit import LongViT, LongViTConfig
from lightning_longnet.sequence import sequence_context
from lightning_longnet.training.metrics import MeanLoss
from lightning_longnet.training.optimization import decay_groups, warmup_cosine


class LongViTModule(L.LightningModule):
    """A LongViT with its loss, metrics and optimiser, for any Lightning strategy.

    Batches are {"pixels": (B, channels, height, width), "label": (B,)}.  Under `ring_sequence_parallel` every rank gets
    whole images and computes its own patches; losses and accuracies are those of a single process.

    Args:
        config: the configuration of the model, or its `to_dict`.
        learning_rate: the highest learning rate.
        weight_decay: weight decay of AdamW; see `decay_groups` for the parameters that decay.
        warmup_share: share of the steps in which the learning rate rises.  It then falls as half a cosine.
        final_share: the last learning rate, as a share of the highest.
        label_smoothing: `label_smoothing` of the cross entropy, in training.
    """

    sequence_dims: ClassVar[dict[str, int | None]] = {"pixels": None, "label": None}

    def __init__(
        self,
        config: LongViTConfig,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_share: float = 0.1,
        final_share: float = 0.01,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(config, dict):
            known = config_of({"config": config})
            if not isinstance(known, LongViTConfig):
                raise ValueError(f"config must be of a LongViT, got {type(known).__name__}")
            config = known
        if config.classes < 2:
            raise ValueError(f"config must have at least 2 classes, got {config.classes}")
        probability("warmup_share", warmup_share)
        self.label_smoothing = probability("label_smoothing", label_smoothing)
        self.config, self.learning_rate, self.weight_decay = config, learning_rate, weight_decay
        self.warmup_share, self.final_share = warmup_share, final_share
        settings = ("learning_rate", "weight_decay", "warmup_share", "final_share", "label_smoothing")
        self.save_hyperparameters({"config": config.to_dict(), **{name: getattr(self, name) for name in settings}})
        self.model = LongViT(config)
        self.val_loss, self.val_accuracy = MeanLoss(), MulticlassAccuracy(config.classes, average="micro")
        self.test_loss, self.test_accuracy = MeanLoss(), MulticlassAccuracy(config.classes, average="micro")

    def setup(self, stage: str) -> None:
        """Raise a ValueError if the data module has more classes than the model."""
        classes = getattr(getattr(self.trainer, "datamodule", None), "classes", ())
        if len(classes) > self.config.classes:
            raise ValueError(
                f"config.classes must be at least those of the data, {len(classes)}, got {self.config.classes}"
            )

    def ordering(self, rows: int, columns: int) -> Tensor | None:
        """Return the order of the patches of a grid, (rows * columns,), or None for `config.ordering`.

        `forward` calls it; subclasses may override it.  See `LongViT.forward`.
        """
        return None

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits (B, classes) of pixels (B, channels, height, width)."""
        size = self.config.patch_size
        logits: Tensor = self.model(pixels, ordering=self.ordering(pixels.shape[-2] // size, pixels.shape[-1] // size))
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss over the images of all ranks."""
        logits, labels = self(batch["pixels"]), batch["label"]
        sums = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        context = sequence_context(self)
        loss = context.token_mean(sums, len(labels))
        accuracy = context.token_mean((logits.argmax(-1) == labels).float().sum(), len(labels))
        options: dict[str, Any] = {"prog_bar": True, "batch_size": len(labels)}
        self.log_dict({"train/loss": loss.detach(), "train/accuracy": accuracy}, **options)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update and log the loss and the accuracy of validation data."""
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update and log the loss and the accuracy of test data."""
        self._evaluate("test", batch)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the most likely class of each image, (B,)."""
        classes: Tensor = self(batch["pixels"]).argmax(-1)
        return classes

    def _evaluate(self, stage: str, batch: dict[str, Tensor]) -> None:
        """Update the metrics of a stage, "val" or "test", without repeated samples, and log them for the epoch."""
        logits, labels = self(batch["pixels"]), batch["label"]
        loss, accuracy = getattr(self, f"{stage}_loss"), getattr(self, f"{stage}_accuracy")
        counted = len(labels) - sequence_context(self).repeated_samples
        if counted:
            logits, labels = logits[:counted], labels[:counted]
            float_logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss.update(F.cross_entropy(float_logits, labels, reduction="sum"), counted)
            accuracy.update(logits, labels)
        options: dict[str, Any] = {
            "on_step": False,
            "on_epoch": True,
            "prog_bar": True,
            "batch_size": len(batch["label"]),
        }
        self.log_dict({f"{stage}/loss": loss, f"{stage}/accuracy": accuracy}, **options)

    def configure_optimizers(self) -> Any:
        """Return AdamW and its scheduler for Lightning, with a learning rate for each step.

        Parameters with and without weight decay are in two groups.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("max_steps must be set where the data has no end: the learning rate falls until then")
        optimizer = torch.optim.AdamW(decay_groups(self, self.weight_decay), self.learning_rate)
        schedule = warmup_cosine(optimizer, int(steps), int(steps * self.warmup_share), self.final_share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
