"""The kernel calls of parts: cut to a bounded size, each with the masks of its rows."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import torch

from lightning_longnet.attention.kernels.call import Call, DropoutMask, OrderMask
from lightning_longnet.attention.plan.lattice import fold_rows
from lightning_longnet.attention.plan.padded import PaddedLattice
from lightning_longnet.attention.plan.parts import part_segments

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from lightning_longnet.attention.kernels import BlockKernel
    from lightning_longnet.attention.kernels.keys import Keys
    from lightning_longnet.attention.kernels.pair_options import PairOptions
    from lightning_longnet.attention.plan.block import Part
    from lightning_longnet.attention.plan.parts import Parts

# A call covers about this share of all rows: its result is held beside the accumulators until it is merged
CALL_SHARE = 1 / 8
# but a result of at most so many bytes is never cut: the calls would cost more time than the memory is worth
WHOLE_BYTES = 8 * 2**20


def cut_parts(kernel: BlockKernel, parts: Parts, q: Tensor, count: int = 1) -> Parts:
    """Return parts cut into calls of bounded size, of which `count` threads compute one each at a time."""
    wide = torch.promote_types(q.dtype, torch.float32)
    limit = q.shape[1] * q.shape[2]
    if q.numel() * wide.itemsize > WHOLE_BYTES:
        limit = int(limit * CALL_SHARE)
    joins = q.device.type == "cpu" and kernel.takes_weights("cpu")  # joined blocks have masks, and weights by head
    key_limit = WHOLE_BYTES // (len(q) * q.shape[3] * wide.itemsize)  # as small as a result that is never cut
    return parts.bounded(limit // count, torch.get_num_threads(), joins, key_limit // count)


def kernel_calls(parts: Iterable[Part], q: Tensor, keys: Keys, options: PairOptions) -> Iterator[tuple[Part, Call]]:
    """Yield the kernel calls of parts, with the masks of padding, dropout and later keys."""
    branch, words = -1, None
    for whole in parts:
        mask = keys.key_padding_mask(whole)
        for part, padding in ((whole, None),) if mask is None else _split_by_padding(whole, mask, q.shape[0]):
            if isinstance(part.block.keys, PaddedLattice) and part.block.low is None:
                # a causal mask hides the rows behind the last one from all before them
                behind = part.block.keys.padding(q.device).repeat(q.shape[0], 1)[:, None]
                padding = behind if padding is None else padding | behind
            dropped = None
            if options.dropout is not None:
                if words is None or branch != part.branch:
                    branch, words = part.branch, options.query_words(q, part.branch)
                dropped = DropoutMask(
                    options.dropout, fold_rows(part.block.queries, words).squeeze(-1), keys.words(part)
                )
            order = None
            if options.masks_later:
                assert options.tokens is not None
                tokens = options.tokens[None, :, None, None].expand(*q.shape[:3], 1)
                order = OrderMask(fold_rows(part.block.queries, tokens).squeeze(-1), keys.tokens(part))
            yield part, Call(part.block, options.scale, padding, dropped, order, options.softcap)


def _split_by_padding(part: Part, padding: Tensor, batch: int) -> Iterator[tuple[Part, Tensor | None]]:
    """Yield a part's segments with their masks: without those that padding masks wholly, and without needless masks.

    On a GPU the part is yielded as it is, with its whole mask.
    """
    if padding.device.type != "cpu":  # reading a mask on a GPU would wait for the device
        yield part, padding
        return
    segments = padding.unflatten(0, (batch, -1))
    some, every = segments.any(-1).any(2).any(0), segments.all(-1).all(2).all(0)
    kinds = (some.int() + every.int()).tolist()  # 0: no key is padding, 1: some are, 2: all are
    first = 0
    for kind, run in groupby(kinds):
        last = first + len(list(run))
        if kind < 2:
            yield part_segments(part, first, last), segments[:, first:last].flatten(0, 1) if kind == 1 else None
        first = last
