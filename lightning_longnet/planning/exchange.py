"""The work and messages of each kind of layer on the busiest ranks, from the same plan that the run follows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.kernels import Request, judge
from lightning_longnet.attention.parallel.rank_blocks import is_local, rank_blocks
from lightning_longnet.attention.parallel.schedule import Schedule, busiest_ranks, schedule
from lightning_longnet.attention.spec import AttentionSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning_longnet.attention.parallel.exchange import ExchangePlan, Footprint, Volume
    from lightning_longnet.attention.parallel.rank_blocks import Layout
    from lightning_longnet.attention.pattern.pattern import Pattern
    from lightning_longnet.attention.plan.block import Part
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
        footprint: what the exchange holds in the rank's memory.
        overlaps: whether the rank computes while messages are on their way.
    """

    volume: Volume
    branch_bytes: tuple[int, ...]
    own_pairs: int
    rounds: tuple[Round, ...]
    footprint: Footprint
    overlaps: bool

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


def layer_kinds(job: Job, device: str = "cpu") -> tuple[LayerKind, ...]:
    """Return the kinds of a job's layers with the shares of all ranks, of many those that may have most to do.

    `device` is the type of the device that computes: it decides whether repeated pairs are computed once.
    """
    kinds = []
    for pattern, layers in Counter(job.config.patterns).items():
        layout = job.layout(pattern)
        chosen = schedule(layout, job.config.exchange or job.exchange, job.sizes)
        local, segments = is_local(layout), _weighted_segments(job, pattern, device)
        shares = {
            rank: _share(job, chosen.plan(layout), rank, segments, local)
            for rank in _shown(layout, busiest_ranks(layout))
        }
        kinds.append(LayerKind(pattern, layers, chosen, shares))
    return tuple(kinds)


def _weighted_segments(job: Job, pattern: Pattern, device: str) -> int:
    """Return what the run would: whether, and from how many segments on, a call computes repeated pairs once."""
    config, width = job.config, job.sizes.head_dim
    request = Request(device, job.dtype, job.tokens, config.heads, width, width, False, config.attention_dropout > 0)
    kernel = judge(config.kernel, request).chosen or ""
    spec = AttentionSpec(pattern, kernel, dropout=config.attention_dropout, mix=config.mix)
    return spec.weighted_segments(device, job.batch, torch.get_num_threads(), per_branch=config.mix == "detached")


def _shown(layout: Layout, ranks: list[int]) -> list[int]:
    """Return the ranks to show; of many the first, the middle, the last, and two of the busiest."""
    if len(ranks) <= WHOLE or layout.placement.ranks <= WHOLE:
        return ranks
    busiest = sorted(ranks, key=lambda rank: sum(rank_blocks(layout).estimated_traffic(rank)))[-2:]
    return sorted({ranks[0], layout.placement.ranks // 2, ranks[-1], *busiest})


def _share(job: Job, exchange: ExchangePlan, rank: int, weighted_segments: int, local: bool) -> Share:
    sizes = job.sizes
    cell = sizes.batch * (sizes.head_dim + sizes.value_dim) * sizes.itemsize
    work = exchange.work(rank, weighted_segments)
    rounds = tuple(Round(sum(each.received.values()) * cell, _pairs(each.parts)) for each in work.rounds)
    sent = (0,) * len(exchange.exchanges)
    if not local:
        sent = tuple(each.sent_bytes for each in exchange.branch_volumes(rank, sizes))
    volume, footprint = exchange.volume(rank, sizes), exchange.footprint(rank)
    return Share(volume, sent, _pairs(work.own), rounds, footprint, exchange.overlaps)


def _pairs(parts: Iterable[Part]) -> int:
    return sum(part.block.pairs for part in parts)


def sent_bytes(job: Job, kinds: tuple[LayerKind, ...], rank: int) -> int:
    """Return the bytes that attention sends in a step; a checkpoint that computes it again fetches its keys again."""
    again = job.config.recompute == "everything"
    sent = 0
    for kind in kinds:
        volume = kind.shares[rank].volume
        sent += kind.layers * (volume.sent_bytes + again * volume.forward_bytes)
    return sent * job.accumulate
