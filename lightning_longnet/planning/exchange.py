"""What each kind of layer computes and sends on the ranks that have most to do: the same plan that the run follows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lightning_longnet.attention.parallel.routes import crossings, head_parts, is_local, route
from lightning_longnet.attention.parallel.schedule import Schedule, Volume, branch_volumes, schedule, volume, watched
from lightning_longnet.planning.fake_rank import Remote

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning_longnet.attention.parallel.routes import Layout, Part
    from lightning_longnet.attention.pattern.pattern import Pattern
    from lightning_longnet.planning.job import Job

# Of more ranks than these some are looked at, and the plan says which
WHOLE = 16


class Round(NamedTuple):
    """One exchange of a forward: what comes, and the pairs that it lets a rank compute."""

    received_bytes: int
    pairs: int


@dataclass(frozen=True)
class Share:
    """A rank's part of one call of attention, forward and backward.

    Attributes:
        volume: what it sends and keeps.
        branch_bytes: what of `volume.sent_bytes` each branch adds to those finer than it; none where heads are traded.
        own_pairs: those that wait for nobody.
        rounds: the rest.
        remote: what other ranks leave in memory.
    """

    volume: Volume
    branch_bytes: tuple[int, ...]
    own_pairs: int
    rounds: tuple[Round, ...]
    remote: Remote

    @property
    def pairs(self) -> int:
        return self.own_pairs + sum(each.pairs for each in self.rounds)


@dataclass(frozen=True)
class LayerKind:
    """Layers of one pattern."""

    pattern: Pattern
    layers: int
    schedule: Schedule
    shares: dict[int, Share]


def layer_kinds(job: Job, distinct: int = 0) -> tuple[LayerKind, ...]:
    """Of the ranks of a group: all of them, of many those that may have most to do.

    `distinct` is that of `attention.plan.plan`: what is computed on CPUs.
    """
    found = []
    for pattern, layers in Counter(job.config.patterns).items():
        layout = job.layout(pattern)
        chosen = schedule(layout, job.config.exchange or job.exchange, job.sizes)
        local = is_local(layout)
        shares = {rank: _share(job, layout, chosen, rank, distinct, local) for rank in _shown(layout, watched(layout))}
        found.append(LayerKind(pattern, layers, chosen, shares))
    return tuple(found)


def _shown(layout: Layout, ranks: list[int]) -> list[int]:
    """Of ranks that have thousands of others to hear of: the first, the middle, the last, and two of the busiest."""
    if len(ranks) <= WHOLE or layout.placement.ranks <= WHOLE:
        return ranks
    busiest = sorted(ranks, key=lambda rank: sum(crossings(layout).traffic(rank)))[-2:]
    return sorted({ranks[0], layout.placement.ranks // 2, ranks[-1], *busiest})


def _share(job: Job, layout: Layout, chosen: Schedule, rank: int, distinct: int, local: bool) -> Share:
    sizes = job.sizes
    cell = sizes.batch * (sizes.head_dim + sizes.value_dim) * sizes.itemsize
    told = volume(layout, chosen.exchanges, rank, sizes)
    computed = layout._replace(distinct=distinct)
    if chosen.is_swap:
        here = layout.kv_heads // layout.placement.ranks
        traded = head_parts(computed, range(rank * here, (rank + 1) * here))
        return Share(told, (), _pairs(traded), (), Remote(0, 0, layout.placement.ranks > 1))
    own = route(computed, rank, chosen.exchanges)
    rounds, kept, most = [], 0, 0
    for each in own.rounds:
        cells = sum(wanted.many() for wanted in each.receives.values())
        parts = [part for wanted in each.receives.values() for part in wanted.parts]
        rounds.append(Round(cells * cell, _pairs(parts)))
        kept, most = (kept + cells, most) if each.keeps else (kept, max(most, cells))
    sent = (0,) * len(chosen.exchanges)
    if not local:
        sent = tuple(each.sent_bytes for each in branch_volumes(layout, chosen.exchanges, rank, sizes))
    return Share(told, sent, _pairs(own.own), tuple(rounds), Remote(kept, most, False))


def _pairs(parts: Iterable[Part]) -> int:
    return sum(part.block.pairs for part in parts)


def sent_bytes(job: Job, kinds: tuple[LayerKind, ...], rank: int) -> int:
    """Of a step, by attention; a checkpoint that computes attention again fetches its keys again."""
    again = job.config.recompute == "everything"
    found = 0
    for kind in kinds:
        told = kind.shares[rank].volume
        found += kind.layers * (told.sent_bytes + again * told.forward_bytes)
    return found * job.accumulate
