"""A LongNet over further tokens of texts, with the keys of the tokens before them in a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_longnet.layers.positions import checked_positions
from lightning_longnet.models.padding import token_rows
from lightning_longnet.sequence.agreement import fault_of
from lightning_longnet.sequence.comparison import checksum

if TYPE_CHECKING:
    from lightning_longnet.inference.cache import DilatedCache
    from lightning_longnet.models.longnet import LongNet

# The number of single tokens between two checks of the reach of the patterns
_REACH_TOKENS = 64


class CachedTokens(NamedTuple):
    """The arguments of `LongNet.encode` besides the tokens."""

    positions: Tensor | None
    documents: Tensor | None
    attention_mask: Tensor | None


def encode_cached(
    model: LongNet, x: Tensor, cache: DilatedCache, given: CachedTokens, states: list[Tensor] | None
) -> Tensor:
    """Map further tokens x (B, N, dim) to the input of the head, in steps of bounded memory; see `LongNet.encode`."""
    fault = fault_of(lambda: _check(model, x, cache, given))
    if cache.ranks.size == 1:
        cache.ranks.check_same(fault, 0, 0)
    else:
        cache.ranks.check_same(fault, cache.number, 0 if fault else _number_of(x, given))
    begin = max(cache.positions)
    if x.shape[1] > 1 or begin % _REACH_TOKENS == 0:
        model._warn_of_reach(begin + x.shape[1])
    documents = given.documents
    if documents is not None:
        documents = checked_positions(documents, x, "documents").expand(x.shape[:2])
    rows = token_rows(x, given.attention_mask, None)
    sizes = None if rows.is_token is None else rows.is_token.sum(1).tolist()
    x, documents = rows.arrange(x), None if documents is None else rows.arrange(documents)
    parts: list[Tensor] = []
    parts_of_states: list[list[Tensor]] = []
    at = 0
    while at < x.shape[1]:
        end = at + cache.next_count(x.shape[1] - at)
        counts = None if sizes is None else [min(max(size - at, 0), end - at) for size in sizes]
        ids = None if documents is None else documents[:, at:end]
        with cache.step(end - at, counts=counts, documents=ids) as step:
            part = step.part(x[:, at:end])
            if model.position_table is not None:
                part = part + model.learned_positions(step.positions)
            own: list[Tensor] | None = None if states is None else []
            parts.append(step.whole(model.norm(model._run_cached_blocks(part, step, own))))
            parts_of_states.append([step.whole(each) for each in own or []])
        at = end
    if states is not None:
        states += [rows.restore(torch.cat(each, 1)) for each in zip(*parts_of_states, strict=True)]
    return rows.restore(parts[0] if len(parts) == 1 else torch.cat(parts, 1))


def _number_of(x: Tensor, given: CachedTokens) -> int:
    """Return a number of what a rank was given to go on with, which ranks that share a cache compare."""
    number = x.shape[1]
    for part in (x, given.documents, given.attention_mask):
        number = (number * 1_000_003 + (1 if part is None else checksum(part))) % 2**61
    return number


def _check(model: LongNet, x: Tensor, cache: DilatedCache, given: CachedTokens) -> None:
    """Refuse what a cache cannot serve."""
    if given.positions is not None:
        raise ValueError("positions must be None with a cache, which counts the tokens of each text itself")
    if torch.is_grad_enabled():
        raise ValueError("a cache holds no gradients: call the model in torch.no_grad() or torch.inference_mode()")
    if model.training:
        raise ValueError("the model must be in evaluation mode with a cache, got training: call model.eval()")
    context = model.sequence_context
    if context is not None and context.is_split:
        raise ValueError("sequences must be whole with a cache, got parts of them: call within context.whole()")
    if x.shape[1] < 1:
        raise ValueError("input_ids must hold at least one token with a cache, got none")
    cache.check(model.config, len(x), x.device)
