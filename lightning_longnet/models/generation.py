"""Generation of tokens, one after the other, from a cache of the keys and values that later tokens see."""

from __future__ import annotations

from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from lightning_longnet.inference.cache import refusal
from lightning_longnet.inference.prompts import fault_of_mask
from lightning_longnet.inference.ranks import CacheRanks
from lightning_longnet.inference.sampling import Sampler, Sampling
from lightning_longnet.inference.step_sizes import LONG_STEP
from lightning_longnet.layers.options import positive_integer
from lightning_longnet.sequence.agreement import fault_of
from lightning_longnet.sequence.comparison import checksum
from lightning_longnet.sequence.context import SequenceContext

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lightning_longnet.inference.cache import DilatedCache
    from lightning_longnet.models.longnet import LongNet

MASK_OF_PREFIX = (
    "cache and attention_mask must be None where the whole prefix is computed for each token: where parameters are "
    "sharded over ranks that do not share sequences, or where the model has no cache"
)


def generate(
    model: LongNet,
    input_ids: Tensor,
    tokens: int,
    *,
    attention_mask: Tensor | None = None,
    end: int | None = None,
    cache: DilatedCache | None = None,
    context: SequenceContext | None = None,
    **sampling: Any,
) -> Tensor:
    """Return `input_ids` continued by `tokens` sampled tokens, (B, N + tokens).

    The keys of the tokens are kept in a cache, which ranks that share sequences split among them.  The whole prefix is
    computed for each token instead where parameters are sharded over ranks that do not share sequences, and by models
    that have no cache (see `DilatedCache`).

    Args:
        model: a causal model.
        input_ids: (B, N), whole sequences, the same on all ranks that share sequences.
        tokens: number of tokens to add.
        attention_mask: (B, N), 0 where a row has padding, on either side; the new tokens follow the N columns.
        end: the token that ends a text.  After it a row is filled with it, and where all rows have it, no more tokens
            are added.
        cache: a cache of the text before `input_ids`, to go on with.  It then holds all tokens but the last one.
        context: the context where sequences are split over ranks: all ranks of its group call this together, and each
            keeps its share of the keys.  All continue with the tokens that the first rank samples.
        sampling: temperature, top_k, top_p, min_p, repetition_penalty and seed; see `Sampling`.  The same seed gives
            the same tokens on any number of ranks.
    """
    further = stream(
        model,
        input_ids,
        tokens,
        attention_mask=attention_mask,
        end=end,
        cache=cache,
        context=context,
        **sampling,
    )
    return torch.cat([input_ids, *(token[:, None] for token in further)], 1)


def stream(
    model: LongNet,
    input_ids: Tensor,
    tokens: int,
    *,
    attention_mask: Tensor | None = None,
    end: int | None = None,
    cache: DilatedCache | None = None,
    context: SequenceContext | None = None,
    **sampling: Any,
) -> Iterator[Tensor]:
    """Return an iterator over the further tokens of each row, (B,), as they are sampled; see `generate`."""
    context = context or SequenceContext()
    group = context.sequence_group if context.sequence_parallel_size > 1 else None
    prompts = _Prompts(input_ids, attention_mask, tokens, end)
    fault = fault_of(lambda: _check(model, prompts, cache, context, sampling))
    ranks = CacheRanks(group) if group is not None or cache is None else cache.ranks
    ranks.check_same(fault, 0, 0 if fault else prompts.number(sampling))
    sampler = Sampler(Sampling(**sampling), input_ids, None if attention_mask is None else attention_mask != 0)
    if caches(model, context):
        if cache is None:
            # an engine that keeps parameters on the host computes on the device of the tokens
            cache = model.new_cache(len(input_ids), device=None if group is None else input_ids.device, group=group)
        source: _Prefix | _Cached = _Cached(model, cache, attention_mask, context)
    else:
        source = _Prefix(model, context)
    return _sampled(source, sampler, prompts, ranks)


class _Prompts(NamedTuple):
    """The prompts of a call, and how they are to end; see `generate`."""

    input_ids: Tensor
    attention_mask: Tensor | None
    tokens: int
    end: int | None

    def number(self, sampling: dict[str, Any]) -> int:
        """Return a number of all of it, which ranks that go on with a text together compare."""
        mask = None if self.attention_mask is None else checksum(self.attention_mask)
        text = f"{self.input_ids.shape} {checksum(self.input_ids)} {mask} {self[2:]} {sorted(sampling.items())}"
        return int.from_bytes(sha256(text.encode()).digest()[:7], "big")


def _check(
    model: LongNet,
    prompts: _Prompts,
    cache: DilatedCache | None,
    context: SequenceContext,
    sampling: dict[str, Any],
) -> None:
    """Raise a ValueError where prompts cannot be continued."""
    input_ids, attention_mask = prompts.input_ids, prompts.attention_mask
    positive_integer("tokens", prompts.tokens)
    if input_ids.dim() != 2 or input_ids.shape[1] < 1:
        raise ValueError(f"input_ids must be (B, N) with at least one token, got shape {tuple(input_ids.shape)}")
    unknown = set(sampling) - set(Sampling.__dataclass_fields__)
    if unknown:
        allowed = ", ".join(Sampling.__dataclass_fields__)
        raise ValueError(f"no option {min(unknown)}; sampling has {allowed}")
    Sampling(**sampling)
    if prompts.end is not None and not 0 <= prompts.end < model.config.vocab_size:
        raise ValueError(
            f"end must be a token of the model, from 0 to {model.config.vocab_size - 1}, got {prompts.end}"
        )
    if not model.config.is_causal:
        raise ValueError("model must be causal in every layer to go on with a sequence")
    if (cache is not None or attention_mask is not None) and not caches(model, context):
        raise ValueError(MASK_OF_PREFIX)
    shared = CacheRanks(context.sequence_group)
    if cache is not None and shared.size > 1 and cache.ranks.numbers_among_all != shared.numbers_among_all:
        raise ValueError(
            f"cache must be split over the {shared.size} ranks that share sequences, got one of {cache.ranks.size}: "
            f"make it by model.new_cache(group=context.sequence_group)"
        )
    if attention_mask is not None and (fault := fault_of_mask(input_ids, attention_mask)):
        raise ValueError(fault)


def _sampled(source: _Prefix | _Cached, sampler: Sampler, prompts: _Prompts, ranks: CacheRanks) -> Iterator[Tensor]:
    """Yield tokens (B,), of which each is given to the source of logits before the next one is sampled."""
    input_ids, end = prompts.input_ids, prompts.end
    model, given = source.model, input_ids
    has_ended = torch.zeros(len(input_ids), dtype=torch.bool)
    for _ in range(prompts.tokens):
        with torch.no_grad(), _evaluating(model):
            # of the first rank: devices of other kinds may round to other logits
            token = ranks.first(sampler.sample(source.logits(given)))[:, 0]
        if end is not None:
            token = token.masked_fill(has_ended, end)
            has_ended |= token == end
        given = token.to(input_ids.device)[:, None]
        yield given[:, 0]
        if has_ended.all():
            return


@contextmanager
def _evaluating(model: LongNet) -> Iterator[None]:
    """Put a model that is trained into evaluation mode while the block runs."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


class _Cached:
    """The logits of the last token of each row, from a cache; ranks that share sequences call it together."""

    def __init__(
        self, model: LongNet, cache: DilatedCache, attention_mask: Tensor | None, context: SequenceContext
    ) -> None:
        self.model, self.cache, self.attention_mask, self.context = model, cache, attention_mask, context

    def logits(self, further: Tensor) -> Tensor:
        """Return the logits (B, vocabulary) after further tokens (B, n)."""
        with self.context.whole():
            return self._logits(further)

    def _logits(self, further: Tensor) -> Tensor:
        mask, self.attention_mask = self.attention_mask, None
        if mask is None:
            for part in further.split(LONG_STEP * self.cache.ranks.size, 1):  # the states of a long prompt are not kept
                hidden = self.model.encode(self.model.embed(part), cache=self.cache)
            last = hidden[:, -1]
        else:
            hidden = self.model.encode(self.model.embed(further), attention_mask=mask, cache=self.cache)
            places = torch.arange(mask.shape[1], device=mask.device)
            last = hidden[torch.arange(len(hidden)), (places * (mask != 0)).argmax(1)]
        logits: Tensor = self.model.head(last)
        return logits


class _Prefix:
    """The logits of the last token of each row, from the whole prefix, on all ranks that share sequences."""

    def __init__(self, model: LongNet, context: SequenceContext) -> None:
        self.model, self.context = model, context
        self.input_ids: Tensor | None = None

    def logits(self, further: Tensor) -> Tensor:
        """Return the logits (B, vocabulary) after further tokens (B, n)."""
        self.input_ids = further if self.input_ids is None else torch.cat([self.input_ids, further], 1)
        model, input_ids = self.model, self.input_ids
        if self.context.sequence_parallel_size == 1:
            hidden = model.encode(model.embed(input_ids))[:, -1]
        else:
            length = input_ids.shape[1]
            with self.context.parts_of(length):
                positions = self.context.positions
                assert positions is not None
                places = positions.to(input_ids.device)
                hidden = model.encode(model.embed(input_ids[:, places]))
                hidden = hidden[:, places == length - 1].sum(1)  # zeros on ranks that do not hold the last token
                dist.all_reduce(hidden, group=self.context.sequence_group)
        logits: Tensor = model.head(hidden)
        return logits


def caches(model: LongNet, context: SequenceContext | None = None) -> bool:
    """Return whether `generate` uses a cache with this model, over the ranks of a context that share sequences.

    Ranks that hold shards of the parameters must call each block equally often.  Those that share sequences do, and
    others compute the prefix.
    """
    if refusal(model.config) is not None:
        return False
    if context is None or context.sequence_parallel_size == 1:
        return not any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    is_sharded = any(hasattr(x, "device_mesh") or hasattr(x, "ds_id") for x in model.parameters())
    return not is_sharded or context.data_parallel_size == 1
