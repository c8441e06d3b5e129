"""A placement for packed rows: ranks hold equally many tokens, and compute about equally many causal pairs.

The work of a causal document grows with the square of its length, so a rank of a contiguous or zigzag placement that
holds much of a long document computes several times the mean.  Here each long document is cut by a zigzag of its own,
and the short ones follow one another over the ranks, as in a contiguous placement:

    documents     a a a a a a a a b b c c      of 8, 2 and 2 tokens, over 2 ranks
    ranks         0 0 1 1 1 1 0 0 0 0 1 1
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from lightning_longnet.attention.parallel.placement import Placement

if TYPE_CHECKING:
    from collections.abc import Sequence

# Documents are cut, the longest first, until no rank has more causal pairs than this multiple of the ranks' mean
BALANCE = 1.05
# A document with fewer tokens per rank than this is not cut
_TOKENS = 2


def balanced_placement(documents: Sequence[int], ranks: int) -> Placement:
    """Return a placement of packed documents that balances causal attention.

    Users pass it to `SequenceShard` or `sequence_plan` as `placement`; strategies split evenly and do not call it.  The
    keys of a document that is cut travel between all ranks, so only the longest are cut, and as few as balance allows.

    Args:
        documents: the lengths of the documents of a row, not their ids as `attend` takes them.
        ranks: the number of ranks.

    >>> balanced_placement((8, 2, 2), 2).chunks(0)
    (Chunk(begin=0, end=2, local=0), Chunk(begin=6, end=10, local=2))
    """
    if ranks < 1 or not documents or min(documents) < 1:
        raise ValueError(
            f"documents must be lengths of at least 1, over at least one rank, got {tuple(documents)} over {ranks}"
        )
    cuts = tuple(accumulate(documents, initial=0))
    least, shortest = max(documents) + 1, _TOKENS * ranks
    while True:
        placement = Placement.of_chunks(_ranges(cuts, ranks, least))
        pairs = causal_pairs(placement, cuts)
        if max(pairs) * ranks <= BALANCE * sum(pairs) or least <= shortest:
            return placement
        least = max(least * 3 // 4, shortest)


def causal_pairs(placement: Placement, cuts: Sequence[int]) -> list[int]:
    """Return the pairs of each rank's queries with the keys of their documents up to themselves, for one head.

    `balanced_placement` compares the ranks by it.  `cuts` are where documents begin, and where the last one ends.
    """
    whole = list(accumulate(((end - begin) * (end - begin + 1) // 2 for begin, end in pairwise(cuts)), initial=0))

    def before(token: int) -> int:
        """Return the pairs of all queries before a token."""
        document = bisect_right(cuts, token) - 1
        place = token - cuts[document]
        return whole[document] + place * (place + 1) // 2

    return [sum(before(c.end) - before(c.begin) for c in placement.chunks(r)) for r in range(placement.ranks)]


def _ranges(cuts: Sequence[int], ranks: int, least: int) -> list[list[tuple[int, int]]]:
    """Return the ranges (begin, end) of each rank, with a zigzag for each document of at least `least` tokens.

    The other documents follow one another over the ranks, until each rank holds its even share of all tokens.
    """
    ranges: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    held = [0] * ranks
    short, cut_tokens = [], 0
    for begin, end in pairwise(cuts):
        if end - begin < least:
            short.append((begin, end))
            continue
        # the tokens that are left over of all documents go to one rank after another, so that ranks hold equally many
        lengths = [_even_share(cut_tokens, end - begin, ranks, rank) for rank in range(ranks)]
        cut_tokens += end - begin
        zigzag = Placement(tuple(lengths), "zigzag")
        for rank in range(ranks):
            ranges[rank] += [(begin + chunk.begin, begin + chunk.end) for chunk in zigzag.chunks(rank)]
            held[rank] += lengths[rank]
    remaining = [_even_share(0, cuts[-1], ranks, rank) - held[rank] for rank in range(ranks)]
    rank = 0
    for begin, end in short:
        at = begin
        while at < end:
            if not remaining[rank]:
                rank += 1
                continue
            until = min(end, at + remaining[rank])
            ranges[rank].append((at, until))
            remaining[rank] -= until - at
            at = until
    return ranges


def _even_share(before: int, tokens: int, ranks: int, rank: int) -> int:
    """Return how many of the tokens that follow `before` others go to a rank, if they go to one after another."""
    return (before + tokens - rank + ranks - 1) // ranks - (before - rank + ranks - 1) // ranks
