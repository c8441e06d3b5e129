"""`LongNetModule`: a LightningModule that trains a LongNet on tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import log
from pathlib import Path  # noqa: TC003
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch.optim import AdamW, Optimizer

from lightning_longnet.checkpointing.checkpoints import read_checkpoint
from lightning_longnet.checkpointing.exports import config_of, model_of
from lightning_longnet.layers.options import positive_number
from lightning_longnet.models.embedding import embed
from lightning_longnet.models.generation import generate
from lightning_longnet.models.longnet import LongNet, LongNetConfig
from lightning_longnet.sequence import sequence_context
from lightning_longnet.training.metrics import BitsPerByte, MeanLoss, Perplexity
from lightning_longnet.training.optimization import decay_groups, warmup_cosine

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.layers.loss import TokenLoss
    from lightning_longnet.models.embedding import Pooling
# The fields of the configuration that a checkpoint must agree on.  With some of them different the weights would still
# fit in shape, but the model would compute something else
_FIELDS_OF_THE_WEIGHTS = (
    *("vocab_size", "dim", "layers", "heads", "kv_heads", "hidden_dim", "activation", "rotary", "qk_norm", "sub_norm"),
    *("bias", "embedding_scale", "learned_positions", "tied_embeddings", "final_norm"),
)


class LongNetModule(L.LightningModule):
    """A LongNet with its loss, metrics and optimiser, for any Lightning strategy.

    Under `ring_sequence_parallel` each rank holds its part of every sequence.

    Batches are dictionaries with `input_ids` and `labels` (B, N), and optionally `attention_mask`, `documents` and
    `positions`; see `LongNet.forward`.  `labels[:, t]` is the token that token t is to predict, or -100.

    The module logs the mean loss over the tokens of all ranks, the perplexity of validation and test data, and bits per
    byte where the data module has an attribute `bytes_per_token`.

    Args:
        config: the configuration of the model.
        learning_rate: the highest learning rate.
        warmup_steps: number of steps in which the learning rate rises to that.  It then falls as half a cosine until
            the end of training.
        final_share: the last learning rate, as a share of the highest.
        weight_decay: weight decay of matrices; biases and norms have none.
        betas: betas of AdamW.
        eps: eps of AdamW.
        optimizer: another optimiser, called with the parameter groups: in YAML a class of torch.optim and its
            arguments.
        generated_tokens: number of tokens that `predict` adds to each sequence.
        temperature: divisor of the logits in `predict`; 0 takes the most likely token.
        top_k: `predict` samples from this many of the most likely tokens only.
        weights: the initial weights: a checkpoint of any engine, or a file or folder that `longnet export` or `longnet
            convert` wrote.  Checkpoints do not save this argument.
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
        if isinstance(config, dict):  # a checkpoint holds it as a dictionary
            known = config_of({"config": config})
            if not isinstance(known, LongNetConfig):
                raise ValueError(f"config must be of a LongNet, got {type(known).__name__}")
            config = known
        positive_number("learning_rate", learning_rate)
        self.config, self.optimizer = config, optimizer
        self.learning_rate, self.warmup_steps, self.final_share = learning_rate, warmup_steps, final_share
        self.weight_decay, self.betas, self.eps = weight_decay, (betas[0], betas[1]), eps
        self.sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k}
        self.generated_tokens = generated_tokens
        # plain values, so that torch.load reads a checkpoint with weights_only=True and without our classes
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
            saved = read_checkpoint(weights)
            self.on_load_checkpoint({"hyper_parameters": saved.hyper_parameters})
            self.model.load_state_dict(model_of(saved).state_dict())
        self.val_metrics, self.test_metrics = self._metrics(None), self._metrics(None)

    def forward(self, input_ids: Tensor, **options: Tensor) -> Tensor:
        """Return the logits (B, N, vocabulary); see `LongNet.forward` for the arguments."""
        logits: Tensor = self.model(input_ids, **options)
        return logits

    # Data

    def setup(self, stage: str) -> None:
        """Check the vocabulary of the data module, and read its `bytes_per_token`, `tokenizer_name` and `tokens`."""
        data = getattr(self.trainer, "datamodule", None)
        vocabulary = getattr(data, "vocab_size", None)
        if vocabulary is not None and vocabulary > self.config.vocab_size:
            raise ValueError(
                f"config.vocab_size must be at least that of the data, {vocabulary}, got {self.config.vocab_size}"
            )
        self.bytes_per_token: float | None = getattr(data, "bytes_per_token", None)
        # saved for programs that read the checkpoint
        self.hparams["tokenizer"] = getattr(data, "tokenizer_name", None)
        self.hparams["tokens"] = getattr(data, "tokens", None)
        self.val_metrics, self.test_metrics = (self._metrics(self.bytes_per_token) for _ in range(2))

    @staticmethod
    def _metrics(bytes_per_token: float | None) -> torch.nn.ModuleDict:
        metrics: dict[str, Any] = {"loss": MeanLoss(), "perplexity": Perplexity()}
        if bytes_per_token is not None:
            metrics["bits_per_byte"] = BitsPerByte(bytes_per_token)
        return torch.nn.ModuleDict(metrics)

    # Steps

    def _losses(self, batch: dict[str, Tensor], repeated: int = 0) -> TokenLoss:
        """Return the sum of the losses of this rank's tokens, and their number, without the last `repeated` samples."""
        if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
            shown = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise ValueError(f"batch must be a dictionary that holds input_ids and labels, got {shown or 'nothing'}")
        options = {name: batch[name] for name in ("positions", "documents", "attention_mask") if name in batch}
        labels = batch["labels"]
        if repeated:
            labels = labels.clone()
            labels[len(labels) - repeated :] = -100
        losses: TokenLoss = self.model(batch["input_ids"], labels, **options)
        return losses

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss over the tokens of all ranks."""
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
        losses = self._losses(batch, sequence_context(self).repeated_samples)
        for name, metric in metrics.items():
            assert isinstance(metric, MeanLoss)
            metric.update(*losses)
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, prog_bar=name == "bits_per_byte")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the sequences of the batch continued by `generated_tokens` tokens, whole on every rank."""
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
        """Return input_ids (B, N) continued by `tokens` sampled tokens; see `generation.generate` for the arguments.

        All ranks that share sequences call this together, with the same whole sequences.
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

    def embed(self, input_ids: Tensor, pooling: Pooling = "mean", attention_mask: Tensor | None = None) -> Tensor:
        """Return embeddings (B, dim) of input_ids (B, N), or states; see `models.embedding.embed` for the arguments.

        All ranks that share sequences call this together, with the same whole sequences.
        """
        context = sequence_context(self)
        return embed(self.model, input_ids, pooling, attention_mask=attention_mask, context=context)

    # Training

    def configure_optimizers(self) -> Any:
        """Return AdamW, or `optimizer`, with decaying and other parameters in two groups, and the schedule per step."""
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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose model differs from this one in a field of `_FIELDS_OF_THE_WEIGHTS`."""
        config = checkpoint.get("hyper_parameters", {}).get("config")
        if config is None:
            return
        known = dict(config)
        own = self.config.to_dict()
        if "vocab_size" not in known:
            raise ValueError("the checkpoint must be of a LongNet, got another model's")
        known["kv_heads"], own["kv_heads"] = known["kv_heads"] or known["heads"], own["kv_heads"] or own["heads"]
        for name in _FIELDS_OF_THE_WEIGHTS:
            if name in known and known[name] != own[name]:
                raise ValueError(f"the checkpoint's model has {name} {known[name]}, and config.{name} is {own[name]}")
