"""Runs blocks through a kernel, and merges what they give."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from math import inf
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.kernels.call import Call, Draw
from lightning_longnet.attention.kernels.keys import accumulate
from lightning_longnet.attention.kernels.partial import Partial
from lightning_longnet.attention.plan.gathering import Gathered
from lightning_longnet.attention.plan.lattice import folded, unfolded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from lightning_longnet.attention.kernels import BlockKernel
    from lightning_longnet.attention.kernels.dropout import Dropout
    from lightning_longnet.attention.kernels.keys import Keys
    from lightning_longnet.attention.parallel.routes import Part

# A call touches about this share of all rows: what a kernel returns is held beside the accumulators until merged
CALL_SHARE = 1 / 8
# Gathered keys are copies, of at most so many rows for each that a call may touch otherwise
GATHERED_ROWS = 4


class Terms(NamedTuple):
    """What all pairs are subject to, whatever block computes them.

    `rows`, `tokens` and `first_head` say where the queries that are here stand in the whole.
    """

    scale: float
    hidden: Tensor | None = None  # (B, N), True where padding hides a key that is here
    dropout: Dropout | None = None
    rows: Tensor | None = None
    tokens: Tensor | None = None
    first_head: int = 0
    counts_once: bool = False  # a pair is one and the same in whatever branch it is computed

    def key_words(self) -> Tensor | None:
        if self.dropout is None:
            return None
        assert self.tokens is not None
        return self.dropout.key_words(self.tokens)


def merge(
    kernel: BlockKernel,
    parts: Iterable[Part],
    q: Tensor,
    keys: Keys,
    terms: Terms,
    into: Sequence[Partial],
    stores: bool = False,
) -> None:
    """Take the keys of blocks into the partial of their branch, or into the only one.

    `stores` says that the first branch shows every row once: its results are written, not added.
    """
    for part, call in _calls(parts, q, keys, terms):
        queries = part.block.queries
        out, lse = kernel.forward(folded(queries, q), *keys.read(part), call)
        found = Partial(unfolded(queries, out, q.shape[0]), unfolded(queries, lse.unsqueeze(-1), q.shape[0]))
        total = into[part.branch if len(into) > 1 else 0]
        if stores and part.branch == 0:
            queries.write(total.out, found.out)
            queries.write(total.lse, found.lse)
        else:
            here = Partial(queries.read(total.out), queries.read(total.lse))
            here.add_(*found, part.block.weight)
            if not queries.is_view:
                queries.write(total.out, here.out)
                queries.write(total.lse, here.lse)
        del out, lse, found  # before the next call makes its own


def spread(
    kernel: BlockKernel,
    parts: Iterable[Part],
    grad: Tensor,
    q: Tensor,
    keys: Keys,
    outs: Sequence[Tensor],
    lse: Tensor,
    terms: Terms,
    dq: Tensor,
    stores: bool = False,
    stores_keys: bool = False,
) -> None:
    """Each block's own backward, given the lse of the one softmax that it is a part of, into dq and the keys'.

    With `P = exp(S - lse)` the exact gradient of the scores is `P (g.v - g.out)`.  "detached" stops it at the branches'
    weights, which leaves `P (g.v - g.out_b)`: `outs` holds the whole's, or each branch's own.
    """
    for part, call in _calls(parts, q, keys, terms):
        queries = part.block.queries
        is_first = part.branch == 0
        found = kernel.backward(
            folded(queries, grad),
            folded(queries, q),
            *keys.read(part),
            folded(queries, outs[part.branch if len(outs) > 1 else 0]),
            folded(queries, lse).squeeze(-1),
            call,
        )
        accumulate(part, dq, found[0], stores and is_first, of_queries=True)
        keys.add(part, *found[1:], stores_keys and is_first)
        del found  # before the next call makes its own


def no_keys(q: Tensor, v: Tensor) -> Partial:
    partial = empty_partial(q, v)
    partial.out.zero_()
    partial.lse.fill_(-inf)
    return partial


def empty_partial(q: Tensor, v: Tensor) -> Partial:
    wide = torch.promote_types(q.dtype, torch.float32)
    return Partial(q.new_empty((*q.shape[:3], v.shape[3]), dtype=wide), q.new_empty((*q.shape[:3], 1), dtype=wide))


def rounded(total: Partial, like: Tensor) -> Partial:
    """Out in the type of q, and lse (B, H, N)."""
    return Partial(total.out.to(like.dtype), total.lse.squeeze(-1).transpose(1, 2).contiguous())


def readable_lse(lse: Tensor) -> Tensor:
    """(B, H, N) -> (B, N, H, 1); where a query sees no key P must be 0, which exp(S + inf) is not."""
    return lse.masked_fill(lse == -inf, inf).transpose(1, 2).unsqueeze(-1)


def _calls(parts: Iterable[Part], q: Tensor, keys: Keys, terms: Terms) -> Iterator[tuple[Part, Call]]:
    """Blocks cut to size, with the padding and the dropout of their rows."""
    branch, words = -1, None
    for whole in _cut(parts, q.shape[1] * q.shape[2] * CALL_SHARE):
        for part, hidden in _by_padding(whole, keys.hidden(whole), q.shape[0]):
            draw = None
            if terms.dropout is not None:
                if words is None or branch != part.branch:
                    branch, words = part.branch, _query_words(terms, q, part.branch)
                draw = Draw(terms.dropout, folded(part.block.queries, words).squeeze(-1), keys.words(part))
            yield part, Call(part.block, terms.scale, hidden, draw)


def _by_padding(part: Part, hidden: Tensor | None, batch: int) -> Iterator[tuple[Part, Tensor | None]]:
    """Segments that padding hides wholly are left out, and those that it leaves alone need no mask."""
    if hidden is None or hidden.device.type != "cpu":  # elsewhere to ask is to wait
        yield part, hidden
        return
    segments = hidden.unflatten(0, (batch, -1))
    some, every = segments.any(-1).any(2).any(0), segments.all(-1).all(2).all(0)
    kinds = (some.int() + every.int()).tolist()
    first = 0
    for kind, run in groupby(kinds):
        last = first + len(list(run))
        if kind < 2:
            yield _segments(part, first, last), segments[:, first:last].flatten(0, 1) if kind == 1 else None
        first = last


def _query_words(terms: Terms, q: Tensor, branch: int) -> Tensor:
    assert terms.dropout is not None
    assert terms.rows is not None
    assert terms.tokens is not None
    heads = torch.arange(q.shape[2], device=q.device) + terms.first_head
    role = 0 if terms.counts_once else branch
    return terms.dropout.query_words(terms.rows, terms.tokens, heads, role).unsqueeze(-1)


def _cut(parts: Iterable[Part], limit: float) -> Iterator[Part]:
    """Blocks of bounded size: by segments, and a large segment by heads."""
    for part in parts:
        queries, keys = part.block.queries, part.block.keys
        count, group = len(queries.starts), queries.heads // keys.heads
        rows = queries.rows * queries.heads
        if isinstance(keys, Gathered):
            rows = max(rows, keys.rows * keys.heads // GATHERED_ROWS)
        segments, heads = max(1, int(limit // rows)), keys.heads
        if queries.rows * queries.heads > limit:
            # fewer heads than threads would leave some idle: the operator's backward runs in parallel over heads
            heads = max(int(limit // (queries.rows * group)), -(-torch.get_num_threads() // group))
        for s in range(0, count, segments):
            for a in range(0, keys.heads, heads):
                b = min(a + heads, keys.heads)
                block = replace(
                    part.block,
                    queries=queries.diagonal(a * group, b * group),
                    keys=keys.diagonal(a, b),
                )
                cells = None if part.cells is None else part.cells[:, a:b]
                yield _segments(part._replace(block=block, cells=cells), s, s + segments)


def _segments(part: Part, first: int, last: int) -> Part:
    block, cells = part.block, part.cells
    return part._replace(
        block=replace(block, queries=block.queries.segments(first, last), keys=block.keys.segments(first, last)),
        cells=None if cells is None else cells[first:last],
    )
