"""The lines on which the branches of a pattern are drawn: each an order of the sequence's rows.

Along a curve a causal branch shows a query the keys of its segment and residue that do not come later in the sequence.
A line with the rows of each segment and residue in the order of the sequence makes a triangle of that.  Branches with
other segments need another line:

    curve                       0 4 5 1 | 2 6 7 3      tokens of a grid of 2 x 4, along the curve
    line of segments of 4       0 1 4 5 | 2 3 6 7      key 1 is before query 4, as in the sequence
    line of segments of 8       0 1 2 3   4 5 6 7

A causal window counts along the curve itself, where no line makes a triangle of it: keys are masked one by one.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.pattern.ordering import inverse_order, sequence_hilbert_order, sorted_sets
from lightning_longnet.attention.pattern.pattern import Pattern

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.pattern.branch import Branch
    from lightning_longnet.attention.pattern.ordering import Ordering


class Line(NamedTuple):
    """An order of the sequence's rows, and the branches that are drawn on it; `lines_of` returns those of a pattern.

    Attributes:
        pattern: these branches.  A causal one masks the keys behind the query on this line.
        branches: their indices among the branches of the whole pattern, from the finest to the coarsest.
        tokens: (N,) the token at each place of the line; None where the line is the sequence.
        places: (N,) the place of each token; None where the line is the sequence.
        masks_later: whether each key that comes later in the sequence than the query is masked besides.
    """

    pattern: Pattern
    branches: tuple[int, ...]
    tokens: Tensor | None = None
    places: Tensor | None = None
    masks_later: bool = False

    def order_from(self, other: Line) -> tuple[Tensor, Tensor]:
        """Return the order that brings rows of another line into this one, `rows[order]`, and its inverse, each (N,).

        Both lines are along a curve.  `LocalOrder.between` calls it for whole sequences, `_line_exchange` of
        rounds_plan.py for those that are split.
        """
        assert self.tokens is not None
        assert self.places is not None
        assert other.tokens is not None
        assert other.places is not None
        return other.places[self.tokens], self.places[other.tokens]


class _LineKey(NamedTuple):
    """The properties that branches on one line share.

    Attributes:
        sets: the segment length and dilation rate whose sets are sorted on the line; None for the curve itself.
        masks_later: whether keys that come later in the sequence are masked one by one.
    """

    sets: tuple[int | None, int] | None
    masks_later: bool = False


def lines_of(ordering: Ordering, cuts: tuple[int, ...], pattern: Pattern, device: torch.device) -> tuple[Line, ...]:
    """Return the lines of a pattern over a sequence; the first one has the finest branch.

    `cuts` are where documents begin, and where the last one ends: each document has a separate curve.  `unsharded_call`
    and `distributed_calls` ask for them in each forward and backward; those along a curve are cached.
    """
    if ordering == "raster":
        return (Line(pattern, tuple(range(len(pattern.branches)))),)
    return _curve_lines(cuts, pattern, device)


def has_masked_line(ordering: Ordering, pattern: Pattern) -> bool:
    """Return whether keys of some line are masked one by one, by the tokens of queries and keys.

    `prepared_call` asks, because only some kernels can do that; see `Request.masks_later`.
    """
    return ordering != "raster" and any(line_key.masks_later for line_key in _branches_by_line(pattern))


def check_ordering(ordering: Ordering, pattern: Pattern) -> None:
    """Raise a ValueError if a pattern cannot be drawn along a curve.

    `check_reordering` calls it for a call of `attend` with an ordering other than "raster"; layers and configurations
    of models call it when they are made.
    """
    if ordering == "raster" or pattern.multiplicity == "multiset" or not any(b.is_causal for b in pattern.branches):
        return
    if not pattern.is_causal:
        raise ValueError(
            f"pattern must be causal in all of its branches or in none where ordering is {ordering!r} and multiplicity "
            "'set'; 'multiset' serves both"
        )
    line_keys = {_line_key(branch) for branch in pattern.branches}
    if len(line_keys) > 1 and any(branch.sparsity is not None for branch in pattern.branches):
        raise ValueError(
            f"pattern must keep all blocks of its {len(pattern.branches)} causal branches where ordering is "
            f"{ordering!r} and multiplicity 'set': the blocks of each are counted on a separate line; 'multiset' "
            "serves them"
        )


def _line_key(branch: Branch) -> _LineKey:
    """Return the key of the line on which a branch is drawn along a curve."""
    if not branch.is_causal:
        return _LineKey(None)
    if branch.window is not None:
        return _LineKey(None, masks_later=True)
    return _LineKey((branch.segment_length, branch.dilation_rate))


def _branches_by_line(pattern: Pattern) -> dict[_LineKey, tuple[int, ...]]:
    """Return the lines that a pattern needs along a curve, and the branches of each.

    Branches are given by their indices in `pattern.ordered()`.
    """
    line_keys: dict[_LineKey, tuple[int, ...]] = {}
    for i, branch in enumerate(pattern.ordered()):
        line_keys[_line_key(branch)] = (*line_keys.get(_line_key(branch), ()), i)
    if pattern.multiplicity == "set" and len(line_keys) > 1:
        # a pair counts in the first branch that shows it, which only a line of all branches shows
        return {_LineKey(None, masks_later=True): tuple(range(len(pattern.branches)))}
    return line_keys


@lru_cache(64)
@torch.inference_mode(False)
def _document_curve(length: int) -> Tensor:
    """Return the Hilbert curve through a document of `length` tokens, (length,), made once for each length."""
    return sequence_hilbert_order(length)


@lru_cache(32)
@torch.inference_mode(False)  # a cached tensor made in inference mode could not be used in training
def _curve_lines(cuts: tuple[int, ...], pattern: Pattern, device: torch.device) -> tuple[Line, ...]:
    """Return the lines of a pattern along a Hilbert curve through each document, made once for the same arguments."""
    ordered, lines = pattern.ordered(), []
    documents = [(begin, _document_curve(end - begin)) for begin, end in pairwise(cuts) if begin < end]
    for (sets, masks_later), members in _branches_by_line(pattern).items():
        branches = tuple(ordered[i] for i in members)
        if masks_later:  # the mask is by tokens, as the places of this line do not say which key is later
            branches = tuple(replace(branch, is_causal=False) for branch in branches)
        places = [begin + (curve if sets is None else sorted_sets(curve, *sets)) for begin, curve in documents]
        tokens = torch.cat(places) if places else torch.empty(0, dtype=torch.long)
        line_pattern = Pattern(branches, pattern.multiplicity)
        lines.append(Line(line_pattern, members, tokens.to(device), inverse_order(tokens).to(device), masks_later))
    return tuple(lines)
