"""The calls of one forward or backward on this rank: samples with the same documents run in one of them."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_longnet.attention.kernels import BLOCK_KERNELS
from lightning_longnet.attention.kernels.blocks import PairOptions
from lightning_longnet.attention.kernels.null_keys import NullKeys
from lightning_longnet.attention.parallel.comm import MessageContext
from lightning_longnet.attention.parallel.exchange import RankCall, Sizes
from lightning_longnet.attention.parallel.lines import LinesCall
from lightning_longnet.attention.parallel.reordering import LocalOrder, RankOrder, ReorderedCall, row_trade
from lightning_longnet.attention.parallel.rounds import RoundsCall
from lightning_longnet.attention.parallel.routes import Layout, Route
from lightning_longnet.attention.parallel.schedule import schedule
from lightning_longnet.attention.pattern.lines import lines_of
from lightning_longnet.attention.plan.blocks import plan
from lightning_longnet.attention.plan.documents import document_cuts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from lightning_longnet.attention.kernels.dropout import Dropout
    from lightning_longnet.attention.parallel.comm import Direction
    from lightning_longnet.attention.parallel.exchange import ExchangeCall, ExchangePlan
    from lightning_longnet.attention.parallel.shard import SequenceShard
    from lightning_longnet.attention.pattern.lines import Line
    from lightning_longnet.attention.spec import AttentionSpec


class Pass(NamedTuple):
    """A forward or a backward of attention: its options, and the rule that drops pairs, or None."""

    spec: AttentionSpec
    direction: Direction
    dropout: Dropout | None
    sinks: Tensor | None


def whole_sequences(
    each: Pass, q: Tensor, k: Tensor, documents: Tensor | None, padding: Tensor | None
) -> Iterator[tuple[slice, ExchangeCall]]:
    """Yield the calls of a process that has whole sequences, each with its samples."""
    spec, length = each.spec, q.shape[1]
    if padding is not None and padding.device.type == "cpu" and not padding.any():
        padding = None
    for rows, cuts in _grouped_by_documents(document_cuts(documents, q.shape[0], length)):
        first, *others = lines_of(spec.ordering, cuts, spec.pattern, q.device)
        own_padding = None if padding is None else padding[rows]
        own = _line_call(each, first, q, k, rows, cuts, own_padding)
        call: ExchangeCall = own
        if others:
            calls = [_line_call(each, line, q, k, rows, cuts, own_padding) for line in others]
            orders = [LocalOrder.between(first, line, q.device) for line in others]
            call = LinesCall(own, tuple(zip(orders, calls, strict=True)))
        if first.tokens is not None:
            assert first.places is not None
            call = ReorderedCall(call, LocalOrder(first.tokens, first.places), spec.returns_lse)
        yield rows, call


def _line_call(
    each: Pass, line: Line, q: Tensor, k: Tensor, rows: slice, cuts: tuple[int, ...], padding: Tensor | None
) -> RoundsCall:
    """Return the call of the branches of one line, for whole sequences with the same documents."""
    spec, samples = each.spec, rows.stop - rows.start
    tokens = torch.arange(q.shape[1], device=q.device) if line.tokens is None else line.tokens
    # the backward of "detached" needs the result of each branch, which the forward merges at once
    per_branch = spec.mix == "detached" and each.direction == "backward"
    segments = spec.weighted_segments(q.device.type, samples, torch.get_num_threads(), per_branch=per_branch)
    whole = plan(line.pattern, q.shape[2], k.shape[2], cuts, segments)
    null_keys = None
    if line.pattern.has_null_keys:
        places = torch.arange(q.shape[1], device=q.device)
        null_keys = NullKeys(line.pattern, cuts, places, q.shape[2], k.shape[2])
    options = PairOptions(
        spec.scale_of(q.shape[3]),
        padding if padding is None or line.tokens is None else padding[:, tokens],
        each.dropout,
        samples=torch.arange(rows.start, rows.stop, device=q.device),
        tokens=tokens,
        counts_once=whole.counts_once,
        branches=line.branches,
        hides_later=line.hides_later,
        sinks=each.sinks,
        null_keys=null_keys,
    )
    route = Route(whole.parts, (), k.shape[2], whole.queries_once, whole.is_partitioned)
    own_outs = len(line.branches) if spec.partials > 1 else 0
    return RoundsCall(BLOCK_KERNELS[spec.kernel], route, options, own_outs)


def sequence_parts(
    each: Pass, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard, number: int
) -> Iterator[tuple[slice, ExchangeCall]]:
    """Yield the calls of a rank that has a part of each sequence; `number` is that of the forward on all ranks."""
    spec, comm, call_name = each.spec, shard.comm, f"{each.direction} of {shard.call_of(number)}"
    wide, kind = torch.promote_types(q.dtype, torch.float32), str(call_kind(q, k, v, spec, each.sinks is not None))
    for rows, cuts in _grouped_by_documents(shard.cuts * (q.shape[0] if len(shard.cuts) == 1 else 1)):
        lines = lines_of(spec.ordering, cuts, spec.pattern, torch.device("cpu"))
        # the pattern as its plan has it; of several lines the exchange is that of the pattern in the sequence's order
        pattern = lines[0].pattern if len(lines) == 1 else spec.pattern
        samples = rows.stop - rows.start
        sizes = Sizes(samples, q.shape[3], v.shape[3], q.element_size(), wide.itemsize)
        layout = Layout(pattern, q.shape[2], k.shape[2], cuts, shard.placement)
        # the number of the first sample is the key of the group's documents
        key = q.shape[2], k.shape[2], rows.start if len(shard.cuts) > 1 else 0
        exchange = shard.cached(
            ("exchange", pattern, *key, spec.exchange, sizes),
            partial(_scheduled, layout, spec.exchange, sizes),
        )
        comm.traffic.add_call(each.direction, exchange, sizes)
        message = MessageContext(f"{call_name}, samples {rows.start} to {rows.stop - 1}", kind)
        segments = spec.weighted_segments(q.device.type, samples, shard.threads, per_branch=spec.mix == "detached")
        rank_call = RankCall(
            shard,
            message,
            spec,
            BLOCK_KERNELS[spec.kernel],
            each.dropout,
            rows,
            segments,
            each.sinks,
            q.shape[3],
            q.device,
            key=(*key, segments),
            lines=lines,
        )
        call: ExchangeCall = exchange.call(rank_call)
        if (order := lines[0].tokens) is not None:
            trade = shard.cached(("order", spec.ordering, spec.pattern, key[-1]), partial(row_trade, order, shard))
            call = ReorderedCall(call, RankOrder(comm, message, trade), spec.returns_lse)
        yield rows, call


def _scheduled(layout: Layout, exchange: str, sizes: Sizes) -> ExchangePlan:
    return schedule(layout, exchange, sizes).plan(layout)


def call_kind(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, has_sinks: bool) -> dict[str, Any]:
    """Return what must be equal on all ranks of a call; the number of a rank's tokens need not be."""
    return {
        "batch": q.shape[0],
        "heads of q": q.shape[2],
        "heads of k": k.shape[2],
        "head_dim": q.shape[3],
        "width of v": v.shape[3],
        "dtype": str(q.dtype),
        "pattern": spec.pattern.dumps(),
        "exchange": spec.exchange,
        "mix": spec.mix,
        "ordering": spec.ordering,
        "presence of sinks": has_sinks,
        "return_lse": spec.returns_lse,
        "kernel": spec.kernel,
        "scale": spec.scale_of(q.shape[3]),
        "dropout": spec.dropout,
        "dropout_samples": (spec.first_sample, spec.sample_step) if spec.dropout else None,
    }


def _grouped_by_documents(cuts: Sequence[tuple[int, ...]]) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Group consecutive samples with equal documents; yield each group as a slice, with where its documents begin."""
    first = 0
    for each, group in groupby(cuts):
        last = first + len(list(group))
        yield slice(first, last), each
        first = last
