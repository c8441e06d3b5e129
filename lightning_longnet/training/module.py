"""`LongNetModule`: a LongNet as a LightningModule, which learns to tell the next token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import log
from pathlib import Path  # noqa: TC003
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch.optim import AdamW, Optimizer

from lightning_longnet.checkpointing.checkpoints import read_checkpoint
from lightning_longnet.checkpointing.exports import model_of
from lightning_longnet.layers.options import positive_number
from lightning_longnet.models.generation import generate
from lightning_longnet.models.longnet import LongNet, LongNetConfig
from lightning_longnet.sequence import sequence_context
from lightning_longnet.training.metrics import BitsPerByte, MeanLoss, Perplexity
from lightning_longnet.training.optimization import decay_groups, warmup_cosine

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.layers.loss import TokenLoss
# what a model cannot change and be the same: with some of these its weights would fit, and mean something else
_OF_THE_WEIGHTS = (
    *("vocab_size", "dim", "layers", "heads", "kv_heads", "hidden_dim", "activation", "rotary", "qk_norm", "sub_norm"),
    *("bias", "embedding_scale", "learned_positions", "tied_embeddings", "final_norm"),
)


class LongNetModule(L.LightningModule):
    """A LongNet and how it is trained, on any strategy: under ours each rank holds its part of every sequence.

    Batches are dictionaries: `input_ids` and `labels`, and where there is any, `attention_mask`, `documents`,
    `positions`.  `labels[t]` is what token t is to predict, or -100.

    Logged are the loss over the tokens of all ranks, bits per byte where the data module tells `bytes_per_token`, and
    the perplexity of validation and test data.

    Args:
        config: of the model.
        learning_rate: at its peak.
        warmup_steps: in which it rises to that; it then falls along half a cosine to the end of training.
        final_share: of the peak, that is left at the end.
        weight_decay: of matrices; biases and norms have none.
        betas: of AdamW.
        eps: of AdamW.
        optimizer: another one, made of groups of parameters: a class of torch.optim and its arguments in YAML.
        generated_tokens: how many `predict` adds to each sequence.
        temperature: of what is drawn then; 0 takes the likeliest token.
        top_k: only so many of the likeliest are drawn from.
        weights: what the model begins with: a checkpoint of any engine, or what `longnet export` or `longnet convert`
            wrote.  Checkpoints do not tell of it.
    """

    def __init__(
        self,
        config: LongNetConfig,
        learning_rate: float = 3e-4,
        warmup_steps: int = 100,
        final_share: float = 0.1,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        optimizer: Callable[[Iterable], Optimizer] | None = None,  # type: ignore[type-arg]  # what the command line reads
        generated_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int | None = None,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        if isinstance(config, dict):  # as checkpoints hold it
            config = LongNetConfig(**config)
        positive_number("learning_rate", learning_rate)
        self.config, self.optimizer = config, optimizer
        self.learning_rate, self.warmup_steps, self.final_share = learning_rate, warmup_steps, final_share
        self.weight_decay, self.betas, self.eps = weight_decay, (betas[0], betas[1]), eps
        self.sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k}
        self.generated_tokens = generated_tokens
        # plain values, which a checkpoint is read with where none of our classes may be
        self.save_hyperparameters(
            {
                "config": config.to_dict(),
                "learning_rate": learning_rate,
                "warmup_steps": warmup_steps,
                "final_share": final_share,
                "weight_decay": weight_decay,
                "betas": list(betas),
                "eps": eps,
                "generated_tokens": generated_tokens,
                "temperature": temperature,
                "top_k": top_k,
            }
        )
        self.model = LongNet(config)
        if weights is not None:
            found = read_checkpoint(weights)
            self.on_load_checkpoint({"hyper_parameters": found.hyper_parameters})
            self.model.load_state_dict(model_of(found).state_dict())
        self.val_metrics, self.test_metrics = self._metrics(None), self._metrics(None)

    def forward(self, input_ids: Tensor, **told: Tensor) -> Tensor:
        """Logits; see `LongNet`."""
        logits: Tensor = self.model(input_ids, **told)
        return logits

    # Data

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        vocabulary = getattr(data, "vocab_size", None)
        if vocabulary is not None and vocabulary > self.config.vocab_size:
            raise ValueError(
                f"config.vocab_size must be at least that of the data, {vocabulary}, got {self.config.vocab_size}"
            )
        self.bytes_per_token: float | None = getattr(data, "bytes_per_token", None)
        self.hparams["tokenizer"] = getattr(data, "tokenizer_name", None)  # for whoever reads the checkpoint
        self.val_metrics, self.test_metrics = (self._metrics(self.bytes_per_token) for _ in range(2))

    @staticmethod
    def _metrics(bytes_per_token: float | None) -> torch.nn.ModuleDict:
        found: dict[str, Any] = {"loss": MeanLoss(), "perplexity": Perplexity()}
        if bytes_per_token is not None:
            found["bits_per_byte"] = BitsPerByte(bytes_per_token)
        return torch.nn.ModuleDict(found)

    # Steps

    def _losses(self, batch: dict[str, Tensor]) -> TokenLoss:
        if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
            shown = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise ValueError(f"batch must be a dictionary that holds input_ids and labels, got {shown or 'nothing'}")
        told = {name: batch[name] for name in ("positions", "documents", "attention_mask") if name in batch}
        found: TokenLoss = self.model(batch["input_ids"], batch["labels"], **told)
        return found

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = sequence_context(self).token_mean(*self._losses(batch))
        self.log("train/loss", loss)
        if self.bytes_per_token is not None:
            bits = loss.detach() / (log(2) * self.bytes_per_token)
            self.log("train/bits_per_byte", bits, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._measure("val", self.val_metrics, batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._measure("test", self.test_metrics, batch)

    def _measure(self, stage: str, metrics: torch.nn.ModuleDict, batch: dict[str, Tensor]) -> None:
        found = self._losses(batch)
        for name, metric in metrics.items():
            assert isinstance(metric, MeanLoss)
            metric.update(*found)
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, prog_bar=name == "bits_per_byte")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The sequences of the batch with `generated_tokens` more."""
        whole = sequence_context(self).gather_sequence(batch["input_ids"])
        return self.generate(whole, self.generated_tokens, **self.sampling)

    def generate(
        self,
        input_ids: Tensor,
        tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Sequences (B, N) with as many tokens more; all ranks call it together, with the same sequences.

        The whole prefix is computed again for each token.
        """
        return generate(
            self.model,
            input_ids,
            tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            context=sequence_context(self),
        )

    # Training

    def configure_optimizers(self) -> Any:
        groups = decay_groups(self, self.weight_decay)
        if self.optimizer is None:
            optimizer: Optimizer = AdamW(groups, self.learning_rate, self.betas, self.eps)
        else:
            optimizer = self.optimizer(groups)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("max_steps or max_epochs of the Trainer must be set: the learning rate falls to their end")
        # a run that is shorter than its warm-up ends within it
        steps = max(int(steps), self.warmup_steps + 1)
        schedule = warmup_cosine(optimizer, steps, self.warmup_steps, self.final_share)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        found = checkpoint.get("hyper_parameters", {}).get("config")
        if found is None:
            return
        known = dict(found)
        own = self.config.to_dict()
        if "vocab_size" not in known:
            raise ValueError("the checkpoint must be of a LongNet, got another model's")
        known["kv_heads"], own["kv_heads"] = known["kv_heads"] or known["heads"], own["kv_heads"] or own["heads"]
        for name in _OF_THE_WEIGHTS:
            if name in known and known[name] != own[name]:
                raise ValueError(f"the checkpoint's model has {name} {known[name]}, and config.{name} is {own[name]}")
