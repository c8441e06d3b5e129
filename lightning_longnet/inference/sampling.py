"""Sampling of tokens from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_longnet.layers.options import positive_integer, positive_number

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled.  The limits apply one after the other, in this order.

    Args:
        repetition_penalty: the logits of tokens that the text has are divided by it if positive, and multiplied if not;
            1 changes nothing.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: samples from this many of the most likely tokens only.
        top_p: samples from the most likely tokens whose probabilities reach this sum only.
        min_p: samples from tokens that have at least this share of the probability of the most likely one only.
        seed: seed of the sampling.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        positive_number("repetition_penalty", self.repetition_penalty)
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature!r}")
        if self.top_k is not None:
            positive_integer("top_k", self.top_k)
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must be more than 0 and at most 1, got {value!r}")


class Sampler:
    """Samples one token after the other, with a generator of its own.

    Args:
        sampling: how.
        input_ids: (B, N) the tokens that the text has; those that are sampled are added.
        is_token: (B, N) False where padding is, or None.
    """

    def __init__(self, sampling: Sampling, input_ids: Tensor, is_token: Tensor | None = None) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._seen: Tensor | None = None
        self._given = (input_ids, is_token)

    def sample(self, logits: Tensor) -> Tensor:
        """Return one token for each row of logits (B, vocabulary) on the CPU, as (B, 1)."""
        logits, sampling = logits.float().cpu(), self.sampling
        if sampling.repetition_penalty != 1:
            penalty = sampling.repetition_penalty
            if self._seen is None:
                self._seen = _seen(*self._given, logits.shape[1])
            logits = torch.where(self._seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if sampling.temperature == 0:
            tokens = logits.argmax(1, keepdim=True)
        else:
            tokens = torch.multinomial(probabilities(logits, sampling), 1, generator=self._generator)
        if self._seen is not None:
            self._seen.scatter_(1, tokens, True)
        return tokens


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities (B, vocabulary) with which tokens are sampled, at a temperature above 0."""
    if sampling.top_k is not None and sampling.top_k < logits.shape[1]:
        threshold = logits.topk(sampling.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    found = (logits / sampling.temperature).softmax(1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = found.sort(stable=True, dim=1, descending=True)
        is_kept = ordered.cumsum(1) - ordered < sampling.top_p  # the sum of those before it does not reach it
        found = found * torch.zeros_like(is_kept).scatter(1, order, is_kept)
    if sampling.min_p is not None:
        found = found.masked_fill(found < sampling.min_p * found.amax(1, keepdim=True), 0)
    return found


def _seen(input_ids: Tensor, is_token: Tensor | None, vocabulary: int) -> Tensor:
    """Return which tokens each row has, (B, vocabulary)."""
    input_ids = input_ids.cpu()
    present = torch.ones_like(input_ids) if is_token is None else is_token.cpu().long()
    return torch.zeros(len(input_ids), vocabulary, dtype=torch.int64).scatter_add(1, input_ids, present) > 0
