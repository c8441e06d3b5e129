"""`TokenModule`: the base of the LightningModules of language models, with steps, metrics, optimiser and schedule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from math import log
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch.optim import AdamW, Optimizer

from lightning_longnet.layers.options import positive_number
from lightning_longnet.sequence import sequence_context
from lightning_longnet.training.metrics import BitsPerByte, MeanLoss, Perplexity
from lightning_longnet.training.optimization import decay_groups, warmup_cosine

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.layers.loss import TokenLoss

MakeOptimizer = Callable[[Iterable], Optimizer]  # type: ignore[type-arg]  # what the command line reads
OPTIMIZATION = ("learning_rate", "warmup_steps", "final_share", "weight_decay", "betas", "eps")


class TokenModule(L.LightningModule):
    """The base of modules that train on tokens: one loss over the tokens of all ranks, for any Lightning strategy.

    The module logs the mean loss over the tokens of all ranks, the perplexity of validation and test data, and bits per
    byte where the data module has an attribute `bytes_per_token`.

    Args:
        learning_rate: the highest learning rate.
        warmup_steps: number of steps in which the learning rate rises to that.
        final_share: the last learning rate, as a share of the highest.
        weight_decay: weight decay of matrices; biases and norms have none.
        betas: betas of AdamW.
        eps: eps of AdamW.
        optimizer: another optimiser, called with the parameter groups.
    """

    def __init__(
        self,
        learning_rate: float,
        warmup_steps: int,
        final_share: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        optimizer: MakeOptimizer | None,
    ) -> None:
        super().__init__()
        positive_number("learning_rate", learning_rate)
        self.learning_rate, self.warmup_steps, self.final_share = learning_rate, warmup_steps, final_share
        self.weight_decay, self.betas, self.eps = weight_decay, (betas[0], betas[1]), eps
        self.optimizer = optimizer
        self.bytes_per_token: float | None = None
        self.val_metrics, self.test_metrics = self._metrics(None), self._metrics(None)

    @property
    def optimization(self) -> dict[str, Any]:
        """The arguments of the optimiser and of the schedule as plain values, for `save_hyperparameters`."""
        values = {name: getattr(self, name) for name in OPTIMIZATION}
        return {**values, "betas": list(self.betas)}

    @abstractmethod
    def token_loss(self, input_ids: Tensor, labels: Tensor, **options: Tensor) -> TokenLoss:
        """Return (sum of the losses, number) of this rank's tokens with a label; each step calls it.

        Args:
            input_ids, labels: (B, L), of this rank's tokens; a label of -100 does not count.
            options: `positions`, `documents` and `attention_mask`, where the batch has them.
        """

    @abstractmethod
    def check_vocabulary(self, data: Any) -> None:
        """Raise a ValueError if the tokens of a data module are not those of the model; `setup` calls it.

        Args:
            data: the data module of the Trainer, or None.
        """

    # Data

    def setup(self, stage: str) -> None:
        """Check the vocabulary of the data module, and read its `bytes_per_token`, `tokenizer_name` and `tokens`.

        Lightning calls it on each rank at the start of a run.
        """
        data = getattr(self.trainer, "datamodule", None)
        self.check_vocabulary(data)
        self.bytes_per_token = getattr(data, "bytes_per_token", None)
        # saved for programs that read the checkpoint
        self.hparams["tokenizer"] = getattr(data, "tokenizer_name", None)
        self.hparams["tokens"] = getattr(data, "tokens", None)
        self.val_metrics, self.test_metrics = (self._metrics(self.bytes_per_token) for _ in range(2))

    @staticmethod
    def _metrics(bytes_per_token: float | None) -> torch.nn.ModuleDict:
        """Return new metrics for validation or test data, by the names under which they are logged."""
        metrics: dict[str, Any] = {"loss": MeanLoss(), "perplexity": Perplexity()}
        if bytes_per_token is not None:
            metrics["bits_per_byte"] = BitsPerByte(bytes_per_token)
        return torch.nn.ModuleDict(metrics)

    # Steps

    def read_batch(self, batch: Any) -> Any:
        """Return a batch of the loader with the names that `training_step` reads; subclasses may rename tensors."""
        return batch

    def _losses(self, batch: dict[str, Tensor], repeated: int = 0) -> TokenLoss:
        """Return `token_loss` of a batch, without the last `repeated` samples, which another rank counts."""
        batch = self.read_batch(batch)
        if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
            shown = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise ValueError(f"batch must be a dictionary that holds input_ids and labels, got {shown or 'nothing'}")
        options = {name: batch[name] for name in ("positions", "documents", "attention_mask") if name in batch}
        labels = batch["labels"]
        if repeated:
            labels = labels.clone()
            labels[len(labels) - repeated :] = -100
        return self.token_loss(batch["input_ids"], labels, **options)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss over the tokens of all ranks.

        The batch holds `input_ids` and `labels`, (B, L), and optionally `attention_mask`, `documents` and `positions`.
        """
        loss = sequence_context(self).token_mean(*self._losses(batch))
        self.log("train/loss", loss)
        if self.bytes_per_token is not None:
            bits = loss.detach() / (log(2) * self.bytes_per_token)
            self.log("train/bits_per_byte", bits, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update and log the metrics of validation data."""
        self._measure("val", self.val_metrics, batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update and log the metrics of test data."""
        self._measure("test", self.test_metrics, batch)

    def _measure(self, stage: str, metrics: torch.nn.ModuleDict, batch: dict[str, Tensor]) -> None:
        """Update metrics with the losses of a batch, without repeated samples, and log them for the epoch."""
        losses = self._losses(batch, sequence_context(self).repeated_samples)
        for name, metric in metrics.items():
            assert isinstance(metric, MeanLoss)
            metric.update(*losses)
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, prog_bar=name == "bits_per_byte")

    # Training

    def configure_optimizers(self) -> Any:
        """Return ([optimizer], [scheduler]) for Lightning: AdamW or `optimizer`, with a learning rate for each step.

        Parameters with and without weight decay are in two groups.
        """
        groups = decay_groups(self, self.weight_decay)
        if self.optimizer is None:
            optimizer: Optimizer = AdamW(groups, self.learning_rate, self.betas, self.eps)
        else:
            optimizer = self.optimizer(groups)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("max_steps or max_epochs of the Trainer must be set: the learning rate falls to their end")
        # the schedule needs more steps than the warm-up; a shorter run ends within the warm-up
        steps = max(int(steps), self.warmup_steps + 1)
        schedule = warmup_cosine(optimizer, steps, self.warmup_steps, self.final_share)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]
