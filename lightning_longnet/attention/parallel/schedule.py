"""The choice of an exchange for each branch, and its reasons: a pure function, the same on all ranks."""

from __future__ import annotations

from heapq import nlargest
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from lightning_longnet.attention.parallel.all_to_all import AllToAllPlan, refusal
from lightning_longnet.attention.parallel.rank_blocks import Layout, is_local, rank_blocks
from lightning_longnet.attention.parallel.rounds_plan import RoundsPlan, rounds_volumes

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_longnet.attention.parallel.exchange import ExchangePlan, Sizes

Exchange = Literal["auto", "local", "gather", "ring", "swap"]

# How much of other ranks' keys and values "auto" lets a rank keep until the backward, as a multiple of its own
SAVED_SHARE = 1.0
# Of more than twice so many ranks, "auto" looks at about so many
SAMPLED_RANKS = 8


class Schedule(NamedTuple):
    """The exchange of each branch, from the finest to the coarsest, and the reason for it: what `schedule` returns."""

    exchanges: tuple[str, ...]
    why: str

    def plan(self, layout: Layout) -> ExchangePlan:
        """Return the plan of a layout, which must be the one that this is the schedule of.

        `_scheduled_plan` of calls.py, `sequence_plan` and `longnet plan` call it.
        """
        return exchange_plan(layout, self.exchanges)


def exchange_plan(layout: Layout, exchanges: tuple[str, ...]) -> ExchangePlan:
    """Return the plan that serves a layout's branches with these exchanges: an `AllToAllPlan` if one is "swap".

    `Schedule.plan` calls it for the choice, and `schedule` to compare "swap" with other choices.
    """
    kind = AllToAllPlan if "swap" in exchanges else RoundsPlan
    return kind(layout, exchanges)


def busiest_ranks(layout: Layout) -> list[int]:
    """Return all ranks, or of many those that may have most to do, by how far their segments and documents span.

    `schedule` compares exchanges on these ranks, and `layer_kinds` of the planner plans them.
    """
    lengths, ranks = layout.placement.lengths, range(layout.placement.ranks)
    if len(ranks) <= 2 * SAMPLED_RANKS:
        return list(ranks)
    traffic = [rank_blocks(layout).estimated_traffic(rank) for rank in ranks]
    keys: list[Callable[[int], float]] = [lambda r: lengths[r], lambda r: traffic[r][0], lambda r: traffic[r][1]]
    return sorted(
        {r for key in keys for r in nlargest(SAMPLED_RANKS // 2, ranks, key)} | {0, len(ranks) // 2, len(ranks) - 1}
    )


def refusal_of(exchange: str, ranks: int, kv_heads: int) -> str:
    """Return why an exchange cannot serve so many ranks, or an empty text; `advice` of planning/run.py asks."""
    return refusal(ranks, kv_heads) if exchange == "swap" else ""


def schedule(layout: Layout, exchange: str, sizes: Sizes) -> Schedule:
    """Return the exchange of each branch, or raise a ValueError with the reason where one cannot serve.

    `_scheduled_plan` of calls.py asks, once for each layout, exchange and sizes of a shard's calls; `sequence_plan`,
    and `layer_kinds` for `longnet plan`, ask without a process group.  "auto" takes the choice that costs the busiest
    rank least, of those that keep few rows of other ranks.

    Args:
        layout: the pattern, the heads, the documents and the placement.
        exchange: the argument of `attend`.
        sizes: the sizes of the tensors.
    """
    branches, ranks = len(layout.pattern.branches), layout.placement.ranks
    if exchange not in get_args(Exchange):
        raise ValueError(f"exchange must be one of {', '.join(map(repr, get_args(Exchange)))}, got {exchange!r}")
    swap_refusal = refusal(ranks, layout.kv_heads)
    if exchange == "swap":
        if swap_refusal:
            raise ValueError(f"{swap_refusal}: use 'gather' or 'ring', or other numbers of heads or ranks")
        return Schedule(("swap",) * branches, "asked for")
    if exchange == "local" and not is_local(layout):
        raise ValueError("exchange 'local' needs every query's keys on its own rank, and some are elsewhere")
    if exchange != "auto":
        name = "gather" if exchange == "local" else exchange
        return Schedule((name,) * branches, "asked for")
    if is_local(layout):
        return Schedule(("gather",) * branches, "nothing has to travel")
    # ranks have equal memories: what fits beside the keys of the longest rank fits beside those of a shorter one
    own = sizes.batch * (sizes.head_dim + sizes.value_dim) * sizes.itemsize * layout.kv_heads
    allowed = SAVED_SHARE * own * max(layout.placement.lengths)
    # the coarser a branch, the farther its keys: what is gathered is kept, and so the fine ones are gathered first
    ways = [("gather",) * i + ("ring",) * (branches - i) for i in range(branches, -1, -1)]
    ways += [] if swap_refusal else [("swap",) * branches]
    rounds = [way for way in ways if "swap" not in way]
    by_rank = [
        rounds_volumes(layout, rounds, rank, sizes)
        + [exchange_plan(layout, way).volume(rank, sizes) for way in ways[len(rounds) :]]
        for rank in busiest_ranks(layout)
    ]
    costs = {
        way: (max(v.cost for v in volumes), max(v.kept_bytes for v in volumes))
        for way, volumes in zip(ways, zip(*by_rank, strict=True), strict=True)
    }
    fitting = {way: cost for way, (cost, kept) in costs.items() if kept <= allowed or "gather" not in way}
    best = min(fitting, key=lambda way: (fitting[way], way.count("ring")))
    parts = [f"{_ways_text(best)} sends least, {fitting[best] / 2**20:.2f} MiB with the cost of its messages"]
    for other in (("gather",) * branches, ("ring",) * branches, ("swap",) * branches):
        if other == best:
            continue
        if other not in costs:
            parts.append(f"swap is refused: {swap_refusal}")
        elif other not in fitting:
            times = costs[other][1] / allowed * SAVED_SHARE
            parts.append(f"{_ways_text(other)} would keep {times:.1f} times the own keys")
        else:
            parts.append(f"{_ways_text(other)} {costs[other][0] / 2**20:.2f} MiB")
    return Schedule(best, "; ".join(parts))


def _ways_text(way: tuple[str, ...]) -> str:
    """Return a choice as text: one word if all branches have the same exchange, else "gather + ring"."""
    return way[0] if len(set(way)) == 1 else " + ".join(way)
