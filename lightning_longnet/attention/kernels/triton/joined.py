"""The phases of several branches as one launch, where that multiplies few more pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.kernels.triton.pieces import period
from lightning_longnet.attention.kernels.triton.rectangles import Phase, Rectangles, Side
from lightning_longnet.attention.kernels.triton.tile_list import TileList, tile_list

if TYPE_CHECKING:
    from collections.abc import Sequence

# One launch writes each row of results once, where launches of one branch read and write it again and again.  For that
# it may multiply this many times as many pairs: its items of distant rows meet more keys that a causal mask hides
MOST_POSITIONS = 1.3
# Rates whose rows repeat at a larger multiple of the smallest rate have too few rows in common
LONGEST_PERIOD = 64


class TiledPhase(NamedTuple):
    """A phase and its tile list: one launch, but for the device."""

    phase: Phase
    tiles: TileList


def tiled_phases(phases: Sequence[Phase], rows: int, others: int, is_by_key: bool, joins: bool) -> list[TiledPhase]:
    """Return the launches of phases with their tile lists: one for all if that pays, else one for each.

    `_make_launches` of launch.py calls it for each of the three programs, when it meets new parts.

    Args:
        phases: those of the function `phases`.
        rows, others: the sizes of a tile.
        is_by_key: whether an item is rows of keys.
        joins: whether one launch may hold several branches.
    """

    def tiled(phase: Phase) -> TiledPhase:
        """Return a phase with its tile list, by its queries or by its keys."""
        rectangles = phase.rectangles.transposed() if is_by_key else phase.rectangles
        return TiledPhase(phase, tile_list(rectangles, rows, others, phase.every))

    separate = [tiled(phase) for phase in phases]
    if not joins or len(phases) < 2 or any(phase.received is not None for phase in phases):
        return separate
    whole = joined(phases)
    if period(whole.rectangles) > LONGEST_PERIOD * int(whole.rectangles.step.min()):
        return separate
    one = tiled(whole)
    most = MOST_POSITIONS * sum(each.tiles.positions(rows, others) for each in separate)
    return [one] if one.tiles.positions(rows, others) <= most else separate


def joined(phases: Sequence[Phase]) -> Phase:
    """Return one phase with the rectangles of all, whose places are counted in the rows of the finest branch.

    `tiled_phases` calls it, and keeps the result if that multiplies few more pairs.
    """
    finest = max(phases, key=lambda phase: len(phase.every))
    unit = int(finest.rectangles.step[0])
    members = []
    for phase in phases:
        rectangles = phase.rectangles
        multiple = int(rectangles.step[0]) // unit if finest.every else 1
        # the rates divide one another, so those that are not later divide the places of all rows
        level = len(finest.every) - len(phase.every)
        assert phase.every == tuple(every // multiple for every in finest.every[level:])
        queries, keys = (side._replace(place=side.place * multiple) for side in (rectangles.queries, rectangles.keys))
        members.append(
            rectangles._replace(
                queries=queries,
                keys=keys,
                unit=torch.full_like(rectangles.head, multiple),
                level=torch.full_like(rectangles.head, level),
            )
        )
    queries, keys = (
        Side(*(torch.cat(fields) for fields in zip(*sides, strict=True)))
        for sides in ([x.queries for x in members], [x.keys for x in members])
    )
    columns = {
        name: torch.cat([getattr(x, name) for x in members])
        for name in Rectangles._fields
        if name not in ("queries", "keys")
    }
    together = Rectangles(queries=queries, keys=keys, **columns)
    return Phase(min(p.branch for p in phases), finest.every, True, any(p.is_signed for p in phases), together)
