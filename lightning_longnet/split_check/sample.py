"""The batch of a split check: a short piece of a real one, whose length differs from the sizes of the parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lightning_longnet.sequence.batches import dim_of, has_no_sequence, length_of, map_tensors, named_tensors
from lightning_longnet.sequence.parts import SequencePart

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lightning_longnet.sequence.context import SequenceContext

_TOKENS = 129  # enough for a few tokens of every kind, and a small share of a training step
_TOKENS_PER_RANK = 16
_LABELS = ("labels", "shift_labels")
_WHOLE = 8192  # the longest sequence that every rank is asked to compute whole


def sample_lengths(length: int, ranks: int, sizes: Collection[int]) -> list[int]:
    """Return the numbers of tokens to try: a short odd one, and the whole length if it is at most `_WHOLE`.

    The short one is uneven over the ranks, so that a mean of their means is not the mean, and neither it nor the number
    of tokens of a rank is a size of a parameter, so that no dimension is mistaken for the sequence.  `_verdict` of
    check.py tries them in this order.

    Args:
        length: the number of tokens of the batch's sequences.
        ranks: the number of ranks that share a sequence.
        sizes: the sizes of the parameters' dimensions.
    """
    longest = min(length, max(_TOKENS, _TOKENS_PER_RANK * ranks + 1))
    uneven = [n for n in range(longest, ranks, -1) if n % 2 and (ranks == 1 or n % ranks)]
    plain = [n for n in uneven if not {n, n // ranks, n // ranks + 1} & set(sizes)]
    lengths = (plain or uneven)[:1]
    return lengths if length > _WHOLE or length in lengths else [*lengths, length]


def aligned_length(length: int, ranks: int) -> int | None:
    """Return a length at which all ranks have equally many tokens, as they have of the real one; else None.

    It is the length itself if that is at most `_WHOLE`, and else a shorter one in which the tokens of a rank have the
    same power of two as a factor, as far as it fits.  `_verdict` of check.py confirms a difference there.
    """
    if length % ranks:
        return None
    if length <= _WHOLE:
        return length
    here = length // ranks
    power = here & -here
    while power > 1 and ranks * power > _WHOLE:
        power //= 2
    return ranks * power * max(1, -(-_TOKENS // (ranks * power)))


def with_fewer_labels(batch: Any, dims: Mapping[str, int | None], tokens: int) -> Any:
    """Return a batch whose first `tokens` tokens have the label -100, so that ranks have unequal numbers of labels.

    `Comparison.verdict` asks with `fewer_labels`.  A batch without integer labels stays as it is.
    """

    def unlabelled(path: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
        dim = dim_of(path, x, dims)
        if dim is None or path[-1] not in _LABELS or x.is_floating_point():
            return x
        x = x.clone()
        x.narrow(dim, 0, tokens).fill_(-100)
        return x

    return map_tensors(batch, unlabelled)


def whole_batch(batch: Any, dims: Mapping[str, int | None], context: SequenceContext) -> Any:
    """Return a batch of whole sequences, the same on all ranks of the sequence group, which call it together.

    `_verdict` of check.py calls it first.  Other batches than a `SequencePart` are whole already.  Of a `SequencePart`
    it is a piece of the first stretch of the group's first rank, taken for whole sequences.
    """
    if not isinstance(batch, SequencePart):
        return batch
    values: list[Any] = [None]
    assert context.sequence_group is not None
    first = dist.get_process_group_ranks(context.sequence_group)[0]
    if dist.get_rank() == first:
        begin, end = batch.stretches[0] if batch.stretches else (0, 0)
        stretch = _cut(batch.tensors, dims, 0, end - begin)
        longest = max(_TOKENS, _TOKENS_PER_RANK * context.sequence_parallel_size + 1)
        values = [sample(stretch, dims, min(end - begin, longest))]
    dist.broadcast_object_list(values, first, group=context.sequence_group)
    return values[0]


def batch_length(batch: Any, dims: Mapping[str, int | None]) -> int | None:
    """Return the number N of tokens of a batch's sequences; None if the model makes the sequences itself.

    `_length` of check.py asks on each rank.
    """
    return None if has_no_sequence(batch, dims) else length_of(batch, dims)


def sample(batch: Any, dims: Mapping[str, int | None], tokens: int | None) -> Any:
    """Return a copy of a batch cut to the `tokens` consecutive tokens that have the most labels; None keeps all.

    `Comparison.verdict` cuts the batch with it, and `Runner.run` copies it for each run.
    """
    if tokens is None:
        return map_tensors(batch, lambda _, x: x.detach().clone())
    return _cut(batch, dims, _begin(batch, dims, tokens), tokens)


def _cut(batch: Any, dims: Mapping[str, int | None], begin: int, tokens: int) -> Any:
    """Return a copy of a batch with the tokens from `begin` to `begin + tokens` of each sequence."""

    def piece(path: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
        dim = dim_of(path, x, dims)
        return x.detach().clone() if dim is None else x.detach().narrow(dim, begin, tokens).clone()

    return map_tensors(batch, piece)


def _begin(batch: Any, dims: Mapping[str, int | None], tokens: int) -> int:
    """Return the index at which the `tokens` consecutive tokens begin that have the most labels and least padding."""
    useful = torch.zeros(length_of(batch, dims))
    for path, x in named_tensors(batch):
        dim = dim_of(path, x, dims)
        if dim is None or path[-1] not in (*_LABELS, "attention_mask") or x.is_floating_point():
            continue
        counted = (x != -100) if path[-1] in _LABELS else (x != 0)
        useful += counted.movedim(dim, 0).flatten(1).sum(1).cpu() if x.dim() > 1 else counted.cpu()
    sums = torch.cat([torch.zeros(1), useful.cumsum(0)])
    return int((sums[tokens:] - sums[:-tokens]).argmax())
