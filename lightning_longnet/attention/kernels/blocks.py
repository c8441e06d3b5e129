"""Run the blocks of a plan through a kernel: merge their results, and add up their gradients."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from math import inf
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.kernels.call import Call, DropoutMask, OrderMask
from lightning_longnet.attention.kernels.keys import accumulate
from lightning_longnet.attention.kernels.partial import Partial
from lightning_longnet.attention.plan.lattice import fold_rows, unfold_rows
from lightning_longnet.attention.plan.paged_keys import PagedKeys

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from lightning_longnet.attention.kernels import BlockKernel
    from lightning_longnet.attention.kernels.dropout import Dropout
    from lightning_longnet.attention.kernels.keys import Keys
    from lightning_longnet.attention.kernels.null_keys import NullKeys
    from lightning_longnet.attention.plan.block import Part

# A call covers about this share of all rows: its result is held beside the accumulators until it is merged
CALL_SHARE = 1 / 8
# Paged keys are copies: a call may copy this many rows for each row that it may cover otherwise
PAGED_ROWS = 4


class PairOptions(NamedTuple):
    """The options that hold for every pair of a call, whichever block computes it.

    Attributes:
        scale: the factor of the scores.
        key_padding_mask: (B, N) of the keys on this rank, True where padding hides one.
        dropout: the rule that drops pairs, or None.
        samples: (B,) the rows of the batch, as dropout numbers them.
        tokens: (N,) the index in the whole sequence of each token on this rank.
        first_head: the first query head on this rank, where ranks hold different heads.
        counts_once: whether a pair is one and the same in whichever branch it is computed.
        branches: the index of each branch in the whole pattern; empty where these are all branches.
        hides_later: whether each key is hidden that comes later in the sequence than the query.
        sinks: (H,) one more logit of the softmax for each query head on this rank, without a value.
        null_keys: the keys of score 0 and value 0 of the queries on this rank, or None.
        softcap: the bound of the scores, or None.
    """

    scale: float
    key_padding_mask: Tensor | None = None
    dropout: Dropout | None = None
    samples: Tensor | None = None
    tokens: Tensor | None = None
    first_head: int = 0
    counts_once: bool = False
    branches: tuple[int, ...] = ()
    hides_later: bool = False
    sinks: Tensor | None = None
    null_keys: NullKeys | None = None
    softcap: float | None = None

    def key_words(self) -> Tensor | None:
        """Return dropout's word for each key on this rank, (N,)."""
        if self.dropout is None:
            return None
        assert self.tokens is not None
        return self.dropout.key_words(self.tokens)

    def key_tokens(self) -> Tensor | None:
        """Return the index in the whole sequence of each key on this rank, (N,), where later keys are hidden."""
        return self.tokens if self.hides_later else None

    def query_words(self, q: Tensor, branch: int) -> Tensor:
        """Return dropout's word for each query, (B, N, H, 1)."""
        assert self.dropout is not None
        assert self.samples is not None
        assert self.tokens is not None
        heads = torch.arange(q.shape[2], device=q.device) + self.first_head
        role = 0 if self.counts_once else self.branches[branch] if self.branches else branch
        return self.dropout.query_words(self.samples, self.tokens, heads, role).unsqueeze(-1)


def forward_blocks(
    kernel: BlockKernel,
    parts: Iterable[Part],
    q: Tensor,
    keys: Keys,
    options: PairOptions,
    totals: Sequence[Partial],
    stores: bool = False,
) -> None:
    """Merge the result of each block into the partial of its branch, or into the only one.

    With `stores` the first branch shows every row once: its results are written over uninitialized memory.
    """
    for part, call in _kernel_calls(parts, q, keys, options):
        queries = part.block.queries
        out, lse = kernel.forward(fold_rows(queries, q), *keys.read(part), call)
        result = Partial(unfold_rows(queries, out, q.shape[0]), unfold_rows(queries, lse.unsqueeze(-1), q.shape[0]))
        total = totals[part.branch if len(totals) > 1 else 0]
        if stores and part.branch == 0:
            queries.write(total.out, result.out)
            queries.write(total.lse, result.lse)
        else:
            rows = Partial(queries.read(total.out), queries.read(total.lse))
            rows.add_(*result, part.block.weight)
            if not queries.is_view:
                queries.write(total.out, rows.out)
                queries.write(total.lse, rows.lse)
        del out, lse, result  # frees them before the next call allocates its own


class BackwardInputs(NamedTuple):
    """The inputs of every block's backward: the gradient of out (B, N, H, D), and the results of the forward.

    `outs` holds the out of the whole softmax, or that of each branch; `lse` (B, N, H, 1) is that of the whole.
    """

    grad: Tensor
    outs: Sequence[Tensor]
    lse: Tensor


def backward_blocks(
    kernel: BlockKernel,
    parts: Iterable[Part],
    q: Tensor,
    keys: Keys,
    inputs: BackwardInputs,
    options: PairOptions,
    dq: Tensor,
    stores: tuple[bool, bool] = (False, False),
) -> None:
    """Run each block's backward with the lse of the whole softmax, and add its gradients to dq and to those of `keys`.

    With `P = exp(S - lse)` the exact gradient of the scores is `P (g.v - g.out)`.  "detached" stops it at the branches'
    weights, which leaves `P (g.v - g.out_b)`, where out_b is the branch's own.  `stores` says for queries and for keys
    that the first branch shows every row once: its gradients are written over uninitialized memory.
    """
    for part, call in _kernel_calls(parts, q, keys, options):
        queries = part.block.queries
        is_first = part.branch == 0
        gradients = kernel.backward(
            fold_rows(queries, inputs.grad),
            fold_rows(queries, q),
            *keys.read(part),
            fold_rows(queries, inputs.outs[part.branch if len(inputs.outs) > 1 else 0]),
            fold_rows(queries, inputs.lse).squeeze(-1),
            call,
        )
        accumulate(part, dq, gradients[0], stores[0] and is_first, of_queries=True)
        keys.add(part, *gradients[1:], stores[1] and is_first)
        del gradients  # frees them before the next call allocates its own


def no_key_partial(q: Tensor, v: Tensor) -> Partial:
    """Return the partial of no key: out is 0 and lse is -inf."""
    partial = uninitialized_partial(q, v)
    partial.out.zero_()
    partial.lse.fill_(-inf)
    return partial


def uninitialized_partial(q: Tensor, v: Tensor) -> Partial:
    """Return uninitialized accumulators in float32, or in float64 for such tensors."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return Partial(q.new_empty((*q.shape[:3], v.shape[3]), dtype=wide), q.new_empty((*q.shape[:3], 1), dtype=wide))


def sum_partials(partials: Sequence[Partial], is_saved: bool = False) -> Partial:
    """Return the sum of partials; a single one is returned without a copy unless it `is_saved` for the backward."""
    if len(partials) == 1 and not is_saved:
        return partials[0]
    total = Partial(*(x.clone() for x in partials[0]))
    for partial in partials[1:]:
        total.add_(*partial)
    return total


def merge_branches(partials: Sequence[Partial], options: PairOptions, is_saved: bool = False) -> Partial:
    """Return the sum of the branches' partials, with the null keys in it.

    Null keys are merged into `partials` in place: "detached" needs the result of each branch with its null keys.  With
    `is_saved` the backward reads `partials` later, so that the sum must be other memory than the only partial.
    """
    if options.null_keys is not None:
        for branch, partial in enumerate(partials):
            options.null_keys.add_to(partial, branch if len(partials) > 1 else None)
    return sum_partials(partials, is_saved)


def finalized(total: Partial, like: Tensor, sinks: Tensor | None = None) -> Partial:
    """Return out in the type of q, and lse as (B, H, N), both with the sinks in the softmax."""
    if sinks is not None:
        total.add_logits_(sinks.to(total.lse.dtype)[:, None])
    return Partial(total.out.to(like.dtype), total.lse.squeeze(-1).transpose(1, 2).contiguous())


def backward_lse(lse: Tensor) -> Tensor:
    """Return lse as (B, N, H, 1), +inf for a query without keys: its P = exp(S - lse) must be 0."""
    return lse.masked_fill(lse == -inf, inf).transpose(1, 2).unsqueeze(-1)


def _kernel_calls(parts: Iterable[Part], q: Tensor, keys: Keys, options: PairOptions) -> Iterator[tuple[Part, Call]]:
    """Yield blocks of bounded size, each with the padding, the dropout and the order of its rows."""
    branch, words = -1, None
    for whole in _bounded(parts, q.shape[1] * q.shape[2] * CALL_SHARE):
        for part, padding in _split_by_padding(whole, keys.key_padding_mask(whole), q.shape[0]):
            mask = None
            if options.dropout is not None:
                if words is None or branch != part.branch:
                    branch, words = part.branch, options.query_words(q, part.branch)
                mask = DropoutMask(options.dropout, fold_rows(part.block.queries, words).squeeze(-1), keys.words(part))
            order = None
            if options.hides_later:
                assert options.tokens is not None
                tokens = options.tokens[None, :, None, None].expand(*q.shape[:3], 1)
                order = OrderMask(fold_rows(part.block.queries, tokens).squeeze(-1), keys.tokens(part))
            yield part, Call(part.block, options.scale, padding, mask, order, options.softcap)


def _split_by_padding(part: Part, padding: Tensor | None, batch: int) -> Iterator[tuple[Part, Tensor | None]]:
    """Yield a part's segments with their masks: without those that padding hides wholly, and without needless masks."""
    if padding is None or padding.device.type != "cpu":  # reading a mask on a GPU would wait for the device
        yield part, padding
        return
    segments = padding.unflatten(0, (batch, -1))
    some, every = segments.any(-1).any(2).any(0), segments.all(-1).all(2).all(0)
    kinds = (some.int() + every.int()).tolist()  # 0: no key is padding, 1: some are, 2: all are
    first = 0
    for kind, run in groupby(kinds):
        last = first + len(list(run))
        if kind < 2:
            yield _segments(part, first, last), segments[:, first:last].flatten(0, 1) if kind == 1 else None
        first = last


def _bounded(parts: Iterable[Part], limit: float) -> Iterator[Part]:
    """Cut parts to at most `limit` rows: by segments, and a large segment by heads."""
    for part in parts:
        queries, keys = part.block.queries, part.block.keys
        count, group = len(queries.starts), queries.heads // keys.heads
        rows = queries.rows * queries.heads
        if isinstance(keys, PagedKeys):
            rows = max(rows, keys.rows * keys.heads // PAGED_ROWS)
        segments, heads = max(1, int(limit // rows)), keys.heads
        if queries.rows * queries.heads > limit:
            # fewer heads than threads would leave some idle: the CPU operator's backward runs in parallel over heads
            heads = max(int(limit // (queries.rows * group)), -(-torch.get_num_threads() // group))
        if segments >= count and heads >= keys.heads:
            yield part
            continue
        for s in range(0, count, segments):
            for a in range(0, keys.heads, heads):
                b = min(a + heads, keys.heads)
                block = replace(
                    part.block,
                    queries=queries.diagonal(a * group, b * group),
                    keys=keys.diagonal(a, b),
                )
                kv_index = None if part.kv_index is None else part.kv_index[:, a:b]
                yield _segments(part._replace(block=block, kv_index=kv_index), s, s + segments)


def _segments(part: Part, first: int, last: int) -> Part:
    """Return the segments `first` to `last` of a part."""
    block, kv_index = part.block, part.kv_index
    return part._replace(
        block=replace(block, queries=block.queries.segments(first, last), keys=block.keys.segments(first, last)),
        kv_index=None if kv_index is None else kv_index[first:last],
    )
