"""Blocks that are merged have the same pairs as before, each as often, in fewer calls."""

from collections import Counter
from unittest.mock import patch

import drawn
import pytest
import torch
from cells import shown_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_longnet import Pattern
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.parallel.rank_blocks import Layout, RankBlocks
from lightning_longnet.attention.parallel.routes import merge_neighboring_parts, route
from lightning_longnet.attention.plan.block import Part
from lightning_longnet.attention.plan.merging import joined_keys, merge_neighbors
from lightning_longnet.attention.plan.parts import Parts

FIVE = Pattern.dilated((32, 64, 128, 256, 512), (1, 2, 4, 8, 16), is_causal=True)
DENSE = Pattern.dense(is_causal=True)


def pairs_of(blocks):
    """Count each pair of some blocks, with their weights; `shown_pairs` also checks that no row is in a call twice."""
    counts = Counter()
    for block in blocks:
        for *pair, times in shown_pairs(block):
            counts[tuple(pair)] += times * block.weight
    return counts


def received_pairs_of(parts):
    """Count each pair of a query and a received KV row."""
    counts = Counter()
    for part in parts:
        segments, heads, _ = part.kv_index.shape
        group = part.block.queries.heads // heads
        queries = iter(part.block.queries.elements())
        for s in range(segments):
            for h in range(part.block.queries.heads):
                for a in range(part.block.queries.rows):
                    row, head = next(queries)
                    for b, index in enumerate(part.kv_index[s, h // group].tolist()):
                        block = part.block
                        if (block.low is None or a - b >= block.low) and (block.high is None or a - b <= block.high):
                            again = sum(a % r.every == r.queries and b % r.every == r.keys for r in block.repeats)
                            counts[row, head, index] += (1 + again) * block.weight
    return counts


@settings(max_examples=150, deadline=None)
@given(
    shown=drawn.nested_branches() | st.lists(drawn.branches(), min_size=1, max_size=3),
    multiplicity=st.sampled_from(["multiset", "set"]),
    kv_heads=st.integers(1, 4),
    documents=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    ranks=st.integers(1, 4),
    kind=st.sampled_from(["contiguous", "zigzag"]),
    limit=st.integers(1, 60),
    distinct=st.booleans(),
)
def test_merged_blocks_have_the_same_pairs(shown, multiplicity, kv_heads, documents, ranks, kind, limit, distinct):
    cuts = (0, *torch.tensor(documents).cumsum(0).tolist())
    placement = Placement.even(cuts[-1], ranks, kind)
    with drawn.planned(distinct, 3):
        layout = Layout(drawn.pattern_of(shown, multiplicity), 2 * kv_heads, kv_heads, cuts, placement, int(distinct))
        between = RankBlocks(layout)
        for rank in range(ranks):
            for source in range(ranks):
                parts = [part for part in between.blocks(rank, source).parts if part.block.stack is None]
                for branch in range(len(shown)):
                    before = [part.block for part in parts if part.branch == branch]
                    after = merge_neighbors(before)
                    assert pairs_of(after) == pairs_of(before)
                    assert len(after) <= len(before)
            for each in route(layout, rank, ("gather",) * len(shown)).rounds:
                before = each.indices().parts
                after = list(joined_keys(before, limit))
                for branch in range(len(shown)):
                    of_branch = [[part for part in some if part.branch == branch] for some in (before, after)]
                    counts = [received_pairs_of(some) for some in of_branch]
                    assert counts[0] == counts[1]
                least = max((part.kv_index.numel() for part in before), default=0)
                assert all(part.kv_index.numel() <= max(limit, least) for part in after)
                # what a negative weight removes has been added before
                total = Counter()
                for part in after:
                    for (*pair, index), times in received_pairs_of([part]).items():
                        total[part.branch, *pair, index] += times
                        assert total[part.branch, *pair, index] >= 0


@pytest.mark.parametrize(
    ("pattern", "kind", "before", "after"),
    [
        (DENSE, "zigzag", [3, 14], [1, 2]),
        (FIVE, "zigzag", [16, 49], [7, 11]),
        (FIVE, "contiguous", [7, 8], [7, 2]),
    ],
)
def test_calls_of_a_rank(pattern, kind, before, after):
    """Rank 4 of 8: the calls on its own keys, and those on the keys that it gathers."""
    layout = Layout(pattern, 8, 8, (0, 256), Placement.even(256, 8, kind))
    own = route(layout, 4, ("gather",) * len(pattern.branches))
    (gather,) = own.rounds
    assert [len(own.own), len(list(joined_keys(gather.indices().parts, 2**20)))] == after
    between = RankBlocks(layout)
    peers = between.possible_peers(4)
    assert [len(between.blocks(4, 4).parts), sum(len(between.blocks(4, r).parts) for r in peers)] == before


def test_a_step_of_a_ring_is_one_call_where_all_queries_see_its_keys():
    layout = Layout(DENSE, 8, 8, (0, 256), Placement.even(256, 8, "zigzag"))
    rounds = route(layout, 4, ("ring",)).rounds
    calls = [len(list(joined_keys(each.indices().parts, 2**20))) for each in rounds]
    assert calls == [1] * 7


def test_parts_of_negative_weight_keep_their_place():
    layout = Layout(Pattern.dense(), 1, 1, (0, 8), Placement.even(8, 4))
    (gather,) = route(layout, 0, ("gather",)).rounds
    first, second, third = gather.indices().parts
    removed = first._replace(block=second.block.__class__(first.block.queries, first.block.keys, weight=-1))
    joined = list(joined_keys([first, removed, second, third, removed], 100))
    assert [part.block.weight for part in joined] == [1, -1, -1]
    assert joined[0].kv_index.shape[2] == 6


def test_parts_are_merged_once_for_a_layout():
    parts = Parts(
        [
            Part(0, block.block)
            for block in RankBlocks(Layout(DENSE, 1, 1, (0, 8), Placement((4, 4)))).blocks(1, 1).parts
        ]
    )
    assert parts.bounded(100, 1) is parts.bounded(100, 1)
    with patch("lightning_longnet.attention.plan.parts.joined_keys", side_effect=AssertionError):
        parts.bounded(100, 1)
    assert merge_neighboring_parts(parts) == parts
