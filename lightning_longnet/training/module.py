"""`LongNetModule`: a LightningModule that trains a LongNet on tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path  # noqa: TC003
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer  # noqa: TC002

from lightning_longnet.checkpointing.checkpoints import read_checkpoint
from lightning_longnet.checkpointing.comparison import message_of
from lightning_longnet.checkpointing.exports import config_of, model_of
from lightning_longnet.inference.prompts import fault_of_prompts, whole_prompts
from lightning_longnet.models.embedding import embed
from lightning_longnet.models.generation import MASK_OF_PREFIX, caches, generate
from lightning_longnet.models.longnet import LongNet, LongNetConfig
from lightning_longnet.sequence import sequence_context
from lightning_longnet.training.token_module import TokenModule

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


# Labels of so many tokens, of which so large a share are the next tokens, are not so by chance
LEAST_TARGETS, NEXT_SHARE = 32, 0.9
# batches after which nothing is counted, as counting waits for the device
MOST_COUNTED_BATCHES = 64


def target_counts(input_ids: Tensor, labels: Tensor) -> Tensor:
    """Return five numbers of labels, (5,): all, those that are the token itself, and those that are the next token.

    The last two are of labels between two different tokens: all of them, and those that are the next token.  In a run
    of one token, labels of masked tokens are equal to the next token, too.
    `LongNetModule.on_train_batch_start` sums the numbers over the ranks.

    Args:
        input_ids, labels: (B, L), of this rank's tokens; a label of -100 does not count.
    """
    targets, tokens, following = labels[:, 1:-1], input_ids[:, 1:-1], input_ids[:, 2:]
    counts = targets != -100
    shows = counts & (following != input_ids[:, :-2])
    follows = targets == following
    numbers = [counts, counts & (targets == tokens), counts & follows, shows, shows & follows]
    return torch.stack([each.sum() for each in numbers]).float()


class LongNetModule(TokenModule):
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
        super().__init__(learning_rate, warmup_steps, final_share, weight_decay, betas, eps, optimizer)
        if isinstance(config, dict):  # a checkpoint holds it as a dictionary
            known = config_of({"config": config})
            if not isinstance(known, LongNetConfig):
                raise ValueError(f"config must be of a LongNet, got {type(known).__name__}")
            config = known
        self.config = config
        self._target_counts, self._counted_batches = [0.0] * 5, 0
        self.sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k}
        self.generated_tokens = generated_tokens
        # plain values, so that torch.load reads a checkpoint with weights_only=True and without our classes
        self.save_hyperparameters(
            {
                "config": config.to_dict(),
                **self.optimization,
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

    def forward(self, input_ids: Tensor, **options: Tensor) -> Tensor:
        """Return the logits (B, L, vocabulary) of this rank's tokens; see `LongNet.forward` for the arguments."""
        logits: Tensor = self.model(input_ids, **options)
        return logits

    def token_loss(self, input_ids: Tensor, labels: Tensor, **options: Tensor) -> TokenLoss:
        """Return (sum of the losses, number) of this rank's tokens with a label; see `LongNet.forward`."""
        losses: TokenLoss = self.model(input_ids, labels, **options)
        return losses

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Raise a ValueError if the model sees the labels: the tokens themselves, or the next ones without causality.

        Such a loss falls towards 0, and the model learns to copy.  All ranks that share a sequence raise it, once the
        batches have had enough labels.
        """
        if self._counted_batches == MOST_COUNTED_BATCHES:
            return
        batch = self.read_batch(batch)
        if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
            return  # `training_step` raises an error
        counts = sequence_context(self).sum_parts(target_counts(batch["input_ids"], batch["labels"]))
        self._target_counts = [sum(each) for each in zip(self._target_counts, counts.tolist(), strict=True)]
        self._counted_batches += 1
        if self._target_counts[3] < LEAST_TARGETS:
            return
        fault = self._fault_of_targets(*self._target_counts)
        # a module that is fitted again with other data begins anew
        self._target_counts, self._counted_batches = [0.0] * 5, 0 if fault else MOST_COUNTED_BATCHES
        if fault:
            raise ValueError(fault)

    def _fault_of_targets(
        self, count: float, same: float, following: float, shown: float, shown_following: float
    ) -> str:
        """Return why the model sees its labels, by the numbers of `target_counts`, or an empty string."""
        if same == count:
            return (
                "labels must not be the input_ids themselves, as each token sees its own: labels[:, t] is the token "
                "that token t is to predict. Give labels = input_ids[:, 1:] with -100 at the end of each row and "
                "document, or labels of tokens that are masked in input_ids"
            )
        # a layer of the user's may be causal whatever the pattern says
        is_causal = self.config.is_causal or self.config.attention is not None
        if not is_causal and following >= NEXT_SHARE * count and shown_following >= NEXT_SHARE * shown:
            return (
                "labels must not be the next tokens where the pattern is not causal, as each token then sees its "
                "target: set is_causal=True in the pattern, or give labels of masked tokens"
            )
        return ""

    def check_vocabulary(self, data: Any) -> None:
        """Raise a ValueError if the data module has a larger vocabulary than the model; `setup` calls it."""
        vocabulary = getattr(data, "vocab_size", None)
        if vocabulary is not None and vocabulary > self.config.vocab_size:
            raise ValueError(
                f"config.vocab_size must be at least that of the data, {vocabulary}, got {self.config.vocab_size}"
            )

    def batch_fault(self, batch: Any) -> str:
        """Return the error message for a batch of `predict` whose rows cannot be continued; else "".

        The strategy calls it for each batch that a loop is given, if ranks share sequences, so that all of them raise
        the error.
        """
        if self._trainer is None or not self._trainer.predicting:
            return ""
        if fault := fault_of_prompts(batch):
            return fault
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        has_cache = caches(self.model, sequence_context(self))
        return "" if mask is None or has_cache or bool(mask.all()) else MASK_OF_PREFIX

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the sequences of the batch continued by `generated_tokens` tokens, whole on every rank.

        The batch holds `input_ids` (B, N), and `attention_mask` where rows have padding, on either side.  A row is one
        text: `documents` and `positions` that say otherwise are refused.
        """
        whole, mask = whole_prompts(batch, sequence_context(self))
        return self.generate(whole, self.generated_tokens, attention_mask=mask, **self.sampling)

    def generate(
        self,
        input_ids: Tensor,
        tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return input_ids (B, N) continued by `tokens` sampled tokens; see `generation.generate` for the arguments.

        All ranks that share sequences call this together, with the same whole sequences.
        """
        return generate(
            self.model,
            input_ids,
            tokens,
            attention_mask=attention_mask,
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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise a ValueError for a checkpoint of another model; Lightning calls it before it loads the weights.

        Models differ by the fields of their configuration in `_FIELDS_OF_THE_WEIGHTS`; others, such as the pattern, may
        be changed.
        """
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
                difference = f"the checkpoint's model has {name} {known[name]}, and config.{name} is {own[name]}"
                path = getattr(self._trainer, "ckpt_path", None)
                raise ValueError(difference if path is None else message_of(path, difference))
