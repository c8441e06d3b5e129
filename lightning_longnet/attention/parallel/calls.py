"""The calls of one forward or backward on this rank: samples with the same documents run in one of them."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from lightning_longnet.attention.kernels import BLOCK_KERNELS, threads
from lightning_longnet.attention.kernels.null_keys import NullKeys
from lightning_longnet.attention.kernels.pair_options import PairOptions
from lightning_longnet.attention.parallel.comm import MessageContext
from lightning_longnet.attention.parallel.exchange import RankCall, Sizes
from lightning_longnet.attention.parallel.joined import JoinedCall
from lightning_longnet.attention.parallel.lines import LinesCall
from lightning_longnet.attention.parallel.rank_blocks import Layout
from lightning_longnet.attention.parallel.reordering import LocalOrder, RankOrder, ReorderedCall, row_exchange
from lightning_longnet.attention.parallel.rounds import RoundsCall
from lightning_longnet.attention.parallel.routes import Route
from lightning_longnet.attention.parallel.schedule import schedule
from lightning_longnet.attention.pattern.lines import lines_of
from lightning_longnet.attention.plan.blocks import plan
from lightning_longnet.attention.plan.packed import PackedRows, packed_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from lightning_longnet.attention.parallel.exchange import ExchangeCall, ExchangePlan, PassOptions
    from lightning_longnet.attention.parallel.reordering import RowExchange
    from lightning_longnet.attention.parallel.shard import SequenceShard
    from lightning_longnet.attention.pattern.lines import Line
    from lightning_longnet.attention.plan.blocks import Plan
    from lightning_longnet.attention.spec import AttentionSpec


def unsharded_call(
    options: PassOptions, q: Tensor, k: Tensor, documents: Tensor | None, padding: Tensor | None
) -> ExchangeCall:
    """Return the object that computes a forward or backward of `attend` without a shard.

    If all samples have the same documents, they are those of the call; otherwise all are joined to one long row, see
    `JoinedCall`.  The operators of op.py call it, unless q is empty or the kernel is "reference".  A call without
    documents, padding, dropout and sinks is kept, see `_plain_call`.

    Args:
        options: the options of this forward or backward.
        q, k: (B, N, H, D) and (B, N, Hkv, D), of which it reads the shapes and the device alone.
        documents: (B, N) document ids, or None.
        padding: (B, N) True where padding masks a key, or None.
    """
    spec, batch = options.spec, q.shape[0]
    if padding is not None and padding.device.type == "cpu" and not padding.any():
        padding = None
    if documents is None and padding is None and options.dropout is None and options.sinks is None:
        plain = _plain_call(options, q.shape[:3], k.shape[2], q.device)
        if plain is not None:
            return plain
    packed = PackedRows(((0, q.shape[1]),)) if documents is None else packed_rows(documents)
    rows = _Rows(packed, q.shape[1], q.shape[2], k.shape[2], 1 if packed.are_equal else batch, q.device)
    if rows.joined > 1 and padding is not None:
        padding = padding.flatten()[None]
    first, *others = lines_of(spec.ordering, packed.cuts, spec.pattern, q.device)
    call: ExchangeCall
    call = first_call = _line_call(options, first, rows, batch, padding)
    if others:
        calls = [_line_call(options, line, rows, batch, padding) for line in others]
        orders = [LocalOrder.between(first, line, q.device) for line in others]
        call = LinesCall(first_call, tuple(zip(orders, calls, strict=True)))
    if first.tokens is not None:
        assert first.places is not None
        call = ReorderedCall(call, LocalOrder(first.tokens, first.places), spec.returns_lse)
    return call if rows.joined == 1 else JoinedCall(call)


MOST_CALLS = 256  # of one plan


class _KeptCall:
    """A call that a plan keeps."""

    def __init__(self, call: RoundsCall) -> None:
        self.call = call


# the plans hold the calls, so that these end with them
_PLAIN_CALLS: WeakValueDictionary[Any, _KeptCall] = WeakValueDictionary()


def _plain_call(options: PassOptions, shape: tuple[int, ...], kv_heads: int, device: torch.device) -> RoundsCall | None:
    """Return the call of rows (B, N, H) without documents and masks, which is kept with its plan.

    It is None where a call holds tensors of its own: the order of a curve, or null keys.  `unsharded_call` asks for it.
    """
    spec, kernel = options.spec, BLOCK_KERNELS[options.spec.kernel]
    # the plan depends on the numbers of threads, and on whether the kernel takes weights
    count = torch.get_num_threads(), threads.available(device)
    key = options, kernel, kernel.takes_weights(device.type), shape, kv_heads, device, count
    kept = _PLAIN_CALLS.get(key)
    if kept is None:
        if spec.ordering != "raster" or spec.pattern.has_null_keys:
            return None
        batch, length, heads = shape
        rows = _Rows(PackedRows(((0, length),)), length, heads, kv_heads, 1, device)
        (line,) = lines_of(spec.ordering, rows.packed.cuts, spec.pattern, device)
        kept = _KeptCall(_line_call(options, line, rows, batch, None))
        calls: dict[Any, _KeptCall] = vars(_line_plan(options, line, rows, batch)).setdefault("_calls", {})
        if len(calls) >= MOST_CALLS:
            calls.clear()
        calls[key] = _PLAIN_CALLS[key] = kept
    return kept.call


class _Rows(NamedTuple):
    """The rows of a call on whole sequences; `unsharded_call` makes it for `_line_call`.

    Attributes:
        packed: their documents.
        length: the tokens of a row.
        heads, kv_heads: the numbers of query heads and of key/value heads.
        joined: how many rows are one long row; 1 where each is a sample.
        device: that of the tensors.
    """

    packed: PackedRows
    length: int
    heads: int
    kv_heads: int
    joined: int
    device: torch.device

    def places(self) -> Tensor:
        """Return the numbers 0, 1, ... of the tokens of the long row, or of each row, (N,)."""
        return torch.arange(self.length * self.joined, device=self.device)


def _line_call(options: PassOptions, line: Line, rows: _Rows, batch: int, padding: Tensor | None) -> RoundsCall:
    """Return the object that computes the branches of one line on whole sequences: it plans their blocks.

    `unsharded_call` calls it for each line of the pattern, with the padding in the order of the sequence, (B, N), or
    (1, B * N) for one long row.
    """
    spec, tokens, samples = options.spec, line.tokens, None
    if options.dropout is not None:
        # dropout chooses pairs by the sample and the token of each row, which a long row has of several samples
        tokens = rows.places() if tokens is None else tokens
        samples = torch.arange(batch, device=rows.device) if rows.joined == 1 else tokens // rows.length
    if tokens is not None and rows.joined > 1:
        tokens = tokens % rows.length  # counted in each sample again
    whole = _line_plan(options, line, rows, batch)
    null_keys = None
    if line.pattern.has_null_keys:
        null_keys = NullKeys(line.pattern, rows.packed.cuts, rows.places(), rows.heads, rows.kv_heads)
    pair_options = PairOptions(
        spec.scale_of(options.head_dim),
        padding if padding is None or line.tokens is None else padding[:, line.tokens],
        options.dropout,
        samples=samples,
        tokens=tokens,
        counts_once=whole.counts_once,
        branches=line.branches,
        masks_later=line.masks_later,
        sinks=options.sinks,
        null_keys=null_keys,
        softcap=spec.softcap,
    )
    route = Route(whole.parts, (), rows.kv_heads, whole.queries_once, whole.is_partitioned)
    branch_outs = len(line.branches) if spec.partials > 1 else 0
    return RoundsCall(BLOCK_KERNELS[spec.kernel], route, pair_options, branch_outs)


def _line_plan(options: PassOptions, line: Line, rows: _Rows, batch: int) -> Plan:
    """Return the plan of the branches of one line, which is cached; `_line_call` and `_plain_call` ask for it."""
    spec = options.spec
    # the backward of "detached" needs the result of each branch, which the forward merges at once; a plan in which
    # pairs of several branches are computed once, with a weight, has no such results
    per_branch = spec.mix == "detached" and options.direction == "backward"
    is_on_cpu, samples_in_call = rows.device.type == "cpu", batch // rows.joined
    for count in (torch.get_num_threads(), 1):
        segments = spec.weighted_segments(rows.device.type, samples_in_call, count, per_branch=per_branch)
        if len(rows.packed.cuts) > 2:
            whole = rows.packed.plan(line.pattern, rows.heads, rows.kv_heads, segments, is_on_cpu)
        else:
            whole = plan(line.pattern, rows.heads, rows.kv_heads, rows.packed.cuts, segments)
        if count == 1 or not whole.parts.tasks(samples_in_call, threads.available(rows.device)):
            break  # a task computes its calls with one thread
    return whole


def distributed_calls(
    options: PassOptions, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard, number: int
) -> Iterator[tuple[slice, ExchangeCall]]:
    """Yield (samples, call) for this rank's part of each sequence; the samples of a call have the same documents.

    A call computes a forward or backward of these samples and exchanges keys with the other ranks; nothing is sent
    before it runs.  The operators of op.py ask for the calls where `attend` was given a shard; every rank makes the
    same calls in the same order.

    Args:
        q, k, v: (B, L, H, D), (B, L, Hkv, D) and (B, L, Hkv, Dv).
        number: `shard.calls` when the forward had begun, the same on all ranks and in its backward.
    """
    spec, comm, call_name = options.spec, shard.comm, f"{options.direction} of {shard.call_of(number)}"
    has_sinks = options.sinks is not None
    groups = shard.cached(
        ("groups", spec, q.shape, k.shape, v.shape, q.dtype, has_sinks),
        lambda: list(_sample_groups(spec, q, k, v, shard, has_sinks)),
    )
    for samples, lines, key, exchange, sizes, kind in groups:
        comm.traffic.add_call(options.direction, exchange, sizes)
        message = MessageContext(f"{call_name}, samples {samples.start} to {samples.stop - 1}", kind)
        segments = spec.weighted_segments(q.device.type, sizes.batch, shard.threads, per_branch=spec.mix == "detached")
        rank_call = RankCall(shard, message, options, samples, segments, q.device, key=(*key, segments), lines=lines)
        call: ExchangeCall = exchange.call(rank_call)
        if (order := lines[0].tokens) is not None:
            rows = shard.cached(
                ("order", spec.ordering, spec.pattern, key[-1], q.device),
                partial(_row_exchange, order, shard, q.device),
            )
            call = ReorderedCall(call, RankOrder(comm, message, rows), spec.returns_lse)
        yield samples, call


class _SampleGroup(NamedTuple):
    """Samples with the same documents, and what is the same in all their calls with equal options and shapes.

    Attributes:
        samples: which samples of the batch.
        lines: the lines of the pattern.
        key: distinguishes their layouts from those of other groups and of other numbers of heads.
        exchange, sizes: the plan of their exchange, and the sizes of their tensors.
        kind: the text of `call_kind`.
    """

    samples: slice
    lines: tuple[Line, ...]
    key: tuple[int, int, int]
    exchange: ExchangePlan
    sizes: Sizes
    kind: str


def _sample_groups(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard, has_sinks: bool
) -> Iterator[_SampleGroup]:
    """Yield the groups of a batch: `distributed_calls` asks at the first call of a kind, and the shard keeps them."""
    wide, kind = torch.promote_types(q.dtype, torch.float32), str(call_kind(q, k, v, spec, has_sinks))
    for samples, cuts in _grouped_by_documents(shard.cuts * (q.shape[0] if len(shard.cuts) == 1 else 1)):
        lines = lines_of(spec.ordering, cuts, spec.pattern, torch.device("cpu"))
        # the pattern as its plan has it; of several lines the exchange is that of the pattern in the sequence's order
        pattern = lines[0].pattern if len(lines) == 1 else spec.pattern
        sizes = Sizes(samples.stop - samples.start, q.shape[3], v.shape[3], q.element_size(), wide.itemsize)
        layout = Layout(pattern, q.shape[2], k.shape[2], cuts, shard.placement)
        # the number of the first sample is the key of the group's documents
        key = q.shape[2], k.shape[2], samples.start if len(shard.cuts) > 1 else 0
        exchange = shard.cached(
            ("exchange", pattern, *key, spec.exchange, sizes),
            partial(_scheduled_plan, layout, spec.exchange, sizes),
        )
        yield _SampleGroup(samples, lines, key, exchange, sizes, kind)


def _row_exchange(order: Tensor, shard: SequenceShard, device: torch.device) -> RowExchange:
    """Return the rows that this rank sends and receives to bring sequences into an order, with indices on a device.

    `distributed_calls` calls it for the first line of a pattern along a curve, and keeps the result in the shard.
    """
    return row_exchange(order, shard).on(device)


def _scheduled_plan(layout: Layout, exchange: str, sizes: Sizes) -> ExchangePlan:
    """Return the plan of the exchanges of all branches, as `schedule` chooses them for "auto", or checks them.

    `_sample_groups` calls it through `SequenceShard.cached`, which keeps the plan as long as the shard.
    """
    return schedule(layout, exchange, sizes).plan(layout)


def call_kind(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, has_sinks: bool) -> dict[str, Any]:
    """Return what must be equal on all ranks of a call; the number of a rank's tokens need not be.

    `_attend_part` of attend.py compares it between ranks before a call, and `distributed_calls` puts it into the tags
    of messages.
    """
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
        "softcap": spec.softcap,
        "dropout": spec.dropout,
        "dropout_samples": (spec.first_sample, spec.sample_step) if spec.dropout else None,
    }


def _grouped_by_documents(cuts: Sequence[tuple[int, ...]]) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Yield (samples, cuts) for each run of consecutive samples with equal documents.

    `cuts` has those of each sample; `samples` is the slice of those that have the cuts which are yielded with it.
    """
    first = 0
    for equal_cuts, group in groupby(cuts):
        last = first + len(list(group))
        yield slice(first, last), equal_cuts
        first = last
