"""Training a LongViT to tell images apart, on one process or with the patches of an image over many."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from lightning_longnet.layers.options import probability
from lightning_longnet.models.longvit import LongViT, LongViTConfig
from lightning_longnet.sequence import sequence_context
from lightning_longnet.training.metrics import MeanLoss
from lightning_longnet.training.optimization import decay_groups, warmup_cosine


class LongViTModule(L.LightningModule):
    """Image classification: batches are {"pixels": (B, channels, height, width), "label": (B,)}.

    Under `ring_sequence_parallel` every rank is given whole images and works on its own patches; losses and accuracies
    are the same numbers as on one process.

    Args:
        config: of the model; or its `to_dict`.
        learning_rate: at its highest.
        weight_decay: of AdamW, for weights alone; see `decay_groups`.
        warmup_share: of the steps, over which the learning rate rises; it then falls as a cosine.
        final_share: of the learning rate, at the end.
        label_smoothing: share of the target that is spread over all classes, in training.
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
            config = LongViTConfig(**config)
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
        classes = getattr(getattr(self.trainer, "datamodule", None), "classes", ())
        if len(classes) > self.config.classes:
            raise ValueError(
                f"config.classes must be at least those of the data, {len(classes)}, got {self.config.classes}"
            )

    def ordering(self, rows: int, columns: int) -> Tensor | None:
        """In which order the patches of such a grid form the sequence; None is `config.ordering`.  For subclasses."""
        return None

    def forward(self, pixels: Tensor) -> Tensor:
        size = self.config.patch_size
        logits: Tensor = self.model(pixels, ordering=self.ordering(pixels.shape[-2] // size, pixels.shape[-1] // size))
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits, labels = self(batch["pixels"]), batch["label"]
        sums = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        context = sequence_context(self)
        loss = context.token_mean(sums, len(labels))
        accuracy = context.token_mean((logits.argmax(-1) == labels).float().sum(), len(labels))
        told: dict[str, Any] = {"prog_bar": True, "batch_size": len(labels)}
        self.log_dict({"train/loss": loss.detach(), "train/accuracy": accuracy}, **told)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The most likely class of each image."""
        classes: Tensor = self(batch["pixels"]).argmax(-1)
        return classes

    def _evaluate(self, stage: str, batch: dict[str, Tensor]) -> None:
        logits, labels = self(batch["pixels"]), batch["label"]
        loss, accuracy = getattr(self, f"{stage}_loss"), getattr(self, f"{stage}_accuracy")
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss.update(F.cross_entropy(wide, labels, reduction="sum"), len(labels))
        accuracy.update(logits, labels)
        told: dict[str, Any] = {"on_step": False, "on_epoch": True, "prog_bar": True, "batch_size": len(labels)}
        self.log_dict({f"{stage}/loss": loss, f"{stage}/accuracy": accuracy}, **told)

    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("max_steps must be set where the data has no end: the learning rate falls until then")
        optimizer = torch.optim.AdamW(decay_groups(self, self.weight_decay), self.learning_rate)
        schedule = warmup_cosine(optimizer, int(steps), int(steps * self.warmup_share), self.final_share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
