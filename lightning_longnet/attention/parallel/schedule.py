"""Which exchange serves which branch, what it moves, and why: a pure function, the same on all ranks."""

from __future__ import annotations

from heapq import nlargest
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch

from lightning_longnet.attention.parallel import all_to_all
from lightning_longnet.attention.parallel.routes import Layout, Wanted, crossings, is_local

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Exchange = Literal["auto", "local", "gather", "ring", "swap"]

# What "auto" lets a rank keep of other ranks' keys and values until the backward, as a multiple of its own
KEPT_SHARE = 1.0
# What a message costs before its first byte, in bytes that could have travelled meanwhile: 20 us at 10 GB/s
MESSAGE_BYTES = 200_000
# Of more than twice so many ranks, "auto" looks at about so many
WATCHED = 8


class Volume(NamedTuple):
    """What one rank sends, forward and backward together, what it keeps in between, and what the forward sends."""

    sent_bytes: int
    messages: int
    kept_bytes: int
    forward_bytes: int

    @property
    def cost(self) -> int:
        return self.sent_bytes + self.messages * MESSAGE_BYTES


class Sizes(NamedTuple):
    """Of the tensors of a call: samples, width of q and k, width of v, bytes of an element and of a gradient's."""

    batch: int
    head_dim: int
    value_dim: int
    itemsize: int
    wide_itemsize: int


class Schedule(NamedTuple):
    """The exchange of each branch, finest first, and how it was come by."""

    exchanges: tuple[str, ...]
    why: str

    @property
    def is_swap(self) -> bool:
        return "swap" in self.exchanges


def volume(layout: Layout, exchanges: tuple[str, ...], rank: int, sizes: Sizes) -> Volume:
    """What a rank sends, forward and backward, and keeps."""
    return _volumes(layout, [exchanges], rank, sizes)[0]


def _volumes(layout: Layout, ways: Sequence[tuple[str, ...]], rank: int, sizes: Sizes) -> list[Volume]:
    """Of several ways at once: the rows of each branch are looked up once for all of them."""
    groups = [
        tuple(tuple(i for i, kind in enumerate(way) if kind == name) for name in ("gather", "ring")) for way in ways
    ]
    wanted = sorted({branches for group in groups for branches in group}, key=len)
    pair = sizes.batch * (sizes.head_dim + sizes.value_dim)
    totals = [[0, 0, 0, 0] for _ in ways]
    between = crossings(layout)
    for peer in between.neighbours(rank):
        come, out = (_counts(between.wanted(*ends), wanted) for ends in ((rank, peer), (peer, rank)))
        for total, group in zip(totals, groups, strict=True):
            for branches, fetches in zip(group, (1, 2), strict=True):
                total[0] += pair * (fetches * out[branches] * sizes.itemsize + come[branches] * sizes.wide_itemsize)
                total[3] += pair * out[branches] * sizes.itemsize
                total[1] += fetches * (out[branches] > 0) + (come[branches] > 0)
            total[2] += pair * come[group[0]] * sizes.itemsize
    return [_swapped(layout, rank, sizes) if "swap" in way else Volume(*t) for way, t in zip(ways, totals, strict=True)]


def branch_volumes(layout: Layout, exchanges: tuple[str, ...], rank: int, sizes: Sizes) -> tuple[Volume, ...]:
    """What each branch adds to those finer than it, whose rows travel once for all of them."""
    many = len(exchanges)
    ways = [(*exchanges[:i], *("none",) * (many - i)) for i in range(many + 1)]
    totals = _volumes(layout, ways, rank, sizes)
    return tuple(Volume(*(b - a for a, b in zip(*pair, strict=True))) for pair in pairwise(totals))


def _counts(wanted: Wanted, groups: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    """How many cells some branches see together, for groups of branches in the order of their size."""
    if not wanted.parts:
        return dict.fromkeys(groups, 0)
    if wanted.is_sparse:
        return {group: len(wanted.listed(group)) for group in groups}
    none = torch.zeros((), dtype=torch.bool)
    single = {branch: wanted.mask((branch,)) for branch in {part.branch for part in wanted.parts}}
    masks: dict[tuple[int, ...], torch.Tensor] = {(): none}
    for group in filter(None, groups):
        smaller, other = (group[:-1], group[-1]) if group[:-1] in masks else (group[1:], group[0])
        if smaller in masks:
            masks[group] = masks[smaller] | single.get(other, none)
        else:
            masks[group] = wanted.mask(group)
    return {group: int(masks[group].sum()) for group in groups}


def _swapped(layout: Layout, rank: int, sizes: Sizes) -> Volume:
    lengths, ranks = layout.placement.lengths, layout.placement.ranks
    to_heads, to_rows = lengths[rank] * (ranks - 1), layout.placement.length - lengths[rank]
    given = layout.heads * sizes.head_dim + layout.kv_heads * (sizes.head_dim + sizes.value_dim)
    out = layout.heads * sizes.value_dim  # or its gradient
    per_token = sizes.batch * sizes.itemsize * (given + out) // ranks
    forward = sizes.batch * sizes.itemsize * (given * to_heads + out * to_rows) // ranks
    peers = sum(1 for r in range(ranks) if r != rank and lengths[r])
    trades = peers + (ranks - 1 if lengths[rank] else 0)
    return Volume((to_heads + to_rows) * per_token, 2 * trades, layout.placement.length * per_token, forward)


def watched(layout: Layout) -> list[int]:
    """All ranks; of many those that may have most to do, by how far their segments and documents span."""
    lengths, ranks = layout.placement.lengths, range(layout.placement.ranks)
    if len(ranks) <= 2 * WATCHED:
        return list(ranks)
    traffic = [crossings(layout).traffic(rank) for rank in ranks]
    keys: list[Callable[[int], float]] = [lambda r: lengths[r], lambda r: traffic[r][0], lambda r: traffic[r][1]]
    return sorted(
        {r for key in keys for r in nlargest(WATCHED // 2, ranks, key)} | {0, len(ranks) // 2, len(ranks) - 1}
    )


def schedule(layout: Layout, exchange: str, sizes: Sizes) -> Schedule:
    """The exchange of each branch, or a ValueError that says why it cannot be had."""
    branches, ranks = len(layout.pattern.branches), layout.placement.ranks
    if exchange not in get_args(Exchange):
        raise ValueError(f"exchange must be one of {', '.join(map(repr, get_args(Exchange)))}, got {exchange!r}")
    refusal = all_to_all.refusal(ranks, layout.kv_heads)
    if exchange == "swap":
        if refusal:
            raise ValueError(f"{refusal}: use 'gather' or 'ring', or other numbers of heads or ranks")
        return Schedule(("swap",) * branches, "asked for")
    if exchange == "local" and not is_local(layout):
        raise ValueError("exchange 'local' needs every query's keys on its own rank, and some are elsewhere")
    if exchange != "auto":
        name = "gather" if exchange == "local" else exchange
        return Schedule((name,) * branches, "asked for")
    if is_local(layout):
        return Schedule(("gather",) * branches, "nothing has to travel")
    # the memories of ranks are alike: what fits beside the keys of the longest fits beside those of a shorter one
    own = sizes.batch * (sizes.head_dim + sizes.value_dim) * sizes.itemsize * layout.kv_heads
    allowed = KEPT_SHARE * own * max(layout.placement.lengths)
    # the coarser a branch, the farther its keys: what is gathered is kept, and so the fine ones are gathered first
    ways = [("gather",) * i + ("ring",) * (branches - i) for i in range(branches, -1, -1)]
    ways += [] if refusal else [("swap",) * branches]
    by_rank = [_volumes(layout, ways, rank, sizes) for rank in watched(layout)]
    found = {
        way: (max(v.cost for v in volumes), max(v.kept_bytes for v in volumes))
        for way, volumes in zip(ways, zip(*by_rank, strict=True), strict=True)
    }
    fitting = {way: cost for way, (cost, kept) in found.items() if kept <= allowed or "gather" not in way}
    best = min(fitting, key=lambda way: (fitting[way], way.count("ring")))
    parts = [f"{_named(best)} sends least, {fitting[best] / 2**20:.2f} MiB with the cost of its messages"]
    for other in (("gather",) * branches, ("ring",) * branches, ("swap",) * branches):
        if other == best:
            continue
        if other not in found:
            parts.append(f"swap is refused: {refusal}")
        elif other not in fitting:
            times = found[other][1] / allowed * KEPT_SHARE
            parts.append(f"{_named(other)} would keep {times:.1f} times the own keys")
        else:
            parts.append(f"{_named(other)} {found[other][0] / 2**20:.2f} MiB")
    return Schedule(best, "; ".join(parts))


def _named(way: tuple[str, ...]) -> str:
    return way[0] if len(set(way)) == 1 else " + ".join(way)
