"""The plan's blocks, cell by cell: every pair as often as the definition says, and no row twice in a call."""

from collections import Counter
from itertools import pairwise
from time import process_time

import brute
import drawn
import pytest
import torch
from brute import Shown
from cells import shown_pairs
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_longnet import Pattern
from lightning_longnet.attention.plan.blocks import plan
from lightning_longnet.attention.plan.overlap import repeats_align


@settings(max_examples=150, deadline=None)
@given(
    shown=drawn.nested_branches() | st.lists(drawn.branches(), min_size=1, max_size=4),
    multiplicity=st.sampled_from(["multiset", "set"]),
    kv_heads=st.integers(1, 6),
    group=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    tile=st.sampled_from([1024, 3]),
)
@example([Shown(2)], "multiset", 1, 2, [9, 8], 1024)  # a group of query heads shows its keys twice
@example([Shown(3, 2), Shown(6, 2)], "set", 2, 1, [12], 1024)  # a segment that its rate does not divide nests in none
@example([Shown(window=2)], "multiset", 1, 1, [9], 3)  # a tile that sees keys on either side
def test_shows_every_pair_as_often_as_the_definition(shown, multiplicity, kv_heads, group, lengths, tile):
    cuts = (0, *torch.tensor(lengths).cumsum(0).tolist())
    length = cuts[-1]
    with drawn.planned(tile == 3, tile):
        result = plan(drawn.pattern_of(shown, multiplicity), kv_heads * group, kv_heads, cuts)
    ids = [i for i, (a, b) in enumerate(pairwise(cuts)) for _ in range(b - a)]
    tables = brute.counts(shown, multiplicity, length, kv_heads, ids)
    assert len(tables) == len(result.branches)
    for table, blocks in zip(tables, result.branches, strict=True):
        counted = Counter()
        for block in blocks:
            pairs = list(shown_pairs(block))
            assert len(pairs) == block.pairs
            for i, h, j, g, times in pairs:
                assert g == h // group
                assert times == 1
                counted[h, i, j] += block.weight
        truth = {(h, i, j): 1 for g, i, j in table.nonzero().tolist() for h in range(g * group, (g + 1) * group)}
        assert {pair: n for pair, n in counted.items() if n} == truth
    if result.is_partitioned:
        for count, lattices in (
            (length * kv_heads * group, [block.queries for block in result.branches[0]]),
            (length * kv_heads, [block.keys for block in result.branches[0]]),
        ):
            cells = [cell for lattice in lattices for cell in lattice.elements()]
            assert len(cells) == len(set(cells)) == count


@settings(max_examples=100, deadline=None)
@given(
    shown=drawn.nested_branches(),
    kv_heads=st.integers(1, 6),
    group=st.integers(1, 2),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    tile=st.sampled_from([2048, 1, 3, 4]),
)
def test_computes_a_pair_once_with_its_multiplicity_as_a_weight(shown, kv_heads, group, lengths, tile):
    cuts = (0, *torch.tensor(lengths).cumsum(0).tolist())
    pattern = drawn.pattern_of(shown, "multiset")
    with drawn.planned(True, tile):
        result = plan(pattern, kv_heads * group, kv_heads, cuts, weighted_segments=1)
    blocks = [block for branch in result.branches for block in branch]
    ids = [i for i, (a, b) in enumerate(pairwise(cuts)) for _ in range(b - a)]
    counts = sum(brute.counts(shown, "multiset", cuts[-1], kv_heads, ids))
    counted = Counter()
    for block in blocks:
        for i, h, j, _, times in shown_pairs(block):
            counted[h, i, j] += times
    truth = {
        (h, i, j): counts[h // group, i, j]
        for h in range(kv_heads * group)
        for i, j in counts[h // group].nonzero().tolist()
    }
    assert counted == truth
    if repeats_align(pattern.ordered(), kv_heads):
        assert result.pairs == len(truth)


def test_longnet_computes_a_quarter_less_than_it_shows():
    pattern = Pattern.dilated((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16), is_causal=True)
    shown = plan(pattern, 8, 8, (0, 65536))
    assert plan(pattern, 8, 8, (0, 65536), weighted_segments=1).pairs == pytest.approx(0.76 * shown.pairs, rel=0.01)
    # two whole segments would leave a third thread idle, and so would documents that are each a call of their own
    assert plan(pattern, 8, 8, (0, 4096), weighted_segments=3) == plan(pattern, 8, 8, (0, 4096))
    assert plan(pattern, 8, 8, (0, 3000, 7000, 9100), weighted_segments=2) == plan(pattern, 8, 8, (0, 3000, 7000, 9100))
    # the paper's rates 4 and 6 do not divide: their branches overlap as no table of weights could say
    paper = Pattern.dilated((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12), is_causal=True)
    assert plan(paper, 12, 12, (0, 65536), weighted_segments=1) == plan(paper, 12, 12, (0, 65536))


def test_a_longnet_branch_is_one_call_for_each_diagonal_of_heads():
    pattern = Pattern.dilated((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16), is_causal=True)
    calls = [len(blocks) for blocks in plan(pattern, 8, 8, (0, 65536)).branches]
    assert calls == [1, 2, 2, 1, 1]


def test_nested_sets_are_less_work_than_multisets():
    def pairs(multiplicity):
        pattern = Pattern.dilated((64, 256, 1024), (1, 2, 4), True, multiplicity=multiplicity)
        return plan(pattern, 4, 4, (0, 4096))

    once, all_of_them = pairs("set"), pairs("multiset")
    assert once.pairs < all_of_them.pairs
    assert all(block.weight == 1 for blocks in once.branches for block in blocks)
    # halves of 256 / 64 and 1024 / 256 segments: two rectangles for each, not one for each segment
    assert [len({(b.queries.rows, b.keys.rows) for b in blocks}) for blocks in once.branches] == [1, 2, 2]


def test_blocked_offsets_do_not_nest():
    pattern = Pattern.dilated((4, 8, 16), (1, 2, 4), head_offsets="blocked", multiplicity="set")
    assert any(block.weight < 0 for blocks in plan(pattern, 4, 4, (0, 16)).branches for block in blocks)


def test_equal_documents_are_one_call_and_scattered_ones_are_copied_together():
    dense = Pattern.dense(is_causal=True)
    (block,) = plan(dense, 2, 2, tuple(range(0, 70, 7))).branches[0]
    assert block.queries.starts == range(0, 57, 7)
    scattered = plan(dense, 2, 2, (0, 3, 7, 10, 15, 18)).branches[0]
    assert {block.queries.starts for block in scattered if block.queries.rows == 3} == {(0, 7, 15)}


def test_a_million_tokens_are_planned_in_a_moment():
    begin = process_time()
    pattern = Pattern.dilated([2048 * 2**i for i in range(10)], [2**i for i in range(10)], True)
    result = plan(pattern, 32, 32, (0, 1 << 20))
    assert process_time() - begin < 2
    assert sum(map(len, result.branches)) < 50


def test_a_window_is_few_calls():
    (blocks,) = plan(Pattern.window(512, is_causal=True), 8, 8, (0, 65536)).branches
    assert len(blocks) == 4  # the near end, the middle, the far end, and the one key that the second tile has there
    assert {(b.low, b.high) for b in blocks if b.keys.rows == 256} == {(0, None), (None, 0)}
    assert sum(block.pairs for block in blocks) == 8 * (65536 * 512 - 512 * 511 // 2)
