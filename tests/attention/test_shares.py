"""Every rank's share of a plan: together they are the definition, and each asks for no more than it sees."""

import pickle
from collections import Counter

import brute
import drawn
import pytest
import torch
from cells import held, shown_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import tiered

from lightning_longnet import balanced_placement
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.parallel.shares import BlockShares, segments_in
from lightning_longnet.attention.plan.blocks import plan


def all_shares(block, placement, rank, source):
    shares = BlockShares([(0, block)])
    for queries in placement.chunks(rank):
        for keys in placement.chunks(source):
            between = shares.between(segments_in(block.queries, queries), segments_in(block.keys, keys))
            yield from (part.block for (part,) in between)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=64))
@settings(max_examples=100, deadline=None)
def test_every_token_stands_on_one_rank(kind, lengths):
    placement = Placement(tuple(lengths), kind)
    for rank, length in enumerate(lengths):
        stretches = placement.chunks(rank)
        assert len(held(placement, rank)) == length
        assert [s.local for s in stretches] == [
            sum(o.end - o.begin for o in stretches[:i]) for i in range(len(stretches))
        ]
    for begin, end in ((0, 5), (3, 4), (-2, 9), (sum(lengths) // 2, sum(lengths))):
        within = {rank for rank in range(len(lengths)) for t in held(placement, rank).tolist() if begin <= t < end}
        assert placement.holders(begin, end) == within
    assert sorted(t for rank in range(len(lengths)) for t in held(placement, rank).tolist()) == list(
        range(sum(lengths))
    )


def test_zigzag_gives_all_ranks_as_many_causal_pairs():
    placement = Placement((10,) * 6, "zigzag")
    pairs = [sum(token + 1 for token in held(placement, rank).tolist()) for rank in range(6)]
    assert len(set(pairs)) == 1


@settings(max_examples=200, deadline=None)
@given(
    shown=drawn.nested_branches() | st.lists(drawn.branches(), min_size=1, max_size=3),
    multiplicity=st.sampled_from(["multiset", "set"]),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 2),
    documents=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    cut=st.lists(st.integers(0, 40), min_size=0, max_size=7),
    kind=st.sampled_from(["contiguous", "zigzag", "documents"]),
    tile=st.sampled_from([1024, 3]),
    distinct=st.booleans(),
)
def test_the_shares_of_all_ranks_are_the_definition(
    shown, multiplicity, kv_heads, group, documents, cut, kind, tile, distinct
):
    cuts = (0, *torch.tensor(documents).cumsum(0).tolist())
    length = cuts[-1]
    borders = sorted({min(c, length) for c in cut}) if len(cut) % 2 else sorted(min(c, length) for c in cut)
    if kind == "documents":
        placement = balanced_placement(documents, len(borders) + 1)
    else:
        placement = Placement(tuple(b - a for a, b in zip([0, *borders], [*borders, length], strict=True)), kind)
    with drawn.planned(distinct, tile):
        result = plan(drawn.pattern_of(shown, multiplicity), kv_heads * group, kv_heads, cuts, int(distinct))
    ids = [i for i, n in enumerate(documents) for _ in range(n)]
    truth = Counter()
    for table in brute.counts(shown, multiplicity, length, kv_heads, ids):
        for g, i, j in table.nonzero().tolist():
            truth.update({(h, i, j): 1 for h in range(g * group, (g + 1) * group)})
    counted = Counter()
    for rank in range(placement.ranks):
        rows = held(placement, rank).tolist()
        for source in range(placement.ranks):
            key_rows = held(placement, source).tolist()
            for blocks in result.branches:
                for block in blocks:
                    for part in all_shares(block, placement, rank, source):
                        pairs = list(shown_pairs(part))
                        assert len(pairs) == part.pairs > 0
                        assert {(i, h) for i, h, *_ in pairs} == set(part.queries.elements())  # each query sees a key
                        assert {(j, g) for _, _, j, g, _ in pairs} == set(part.keys.elements())  # each key is seen
                        for i, h, j, g, times in pairs:
                            assert g == h // group
                            counted[h, rows[i], key_rows[j]] += times * part.weight
    assert {pair: n for pair, n in counted.items() if n} == truth


QUICK, LONG = (1, 2, 3, 8, 13), (5, 6, 16, 31, 64)


@pytest.mark.parametrize(
    "ranks", tiered(range(1, 65), quick=QUICK, full=[ranks for ranks in range(1, 65) if ranks not in QUICK + LONG])
)
def test_worlds_of_up_to_64_ranks(ranks):
    pattern = [brute.Shown(16, 1, None, True), brute.Shown(48, 3, None, True), brute.Shown(None, 5, None, True)]
    length = 101
    (truth, *more) = brute.counts(pattern, "multiset", length, 2)
    for table in more:
        truth = truth + table
    result = plan(drawn.pattern_of(pattern, "multiset"), 2, 2, (0, length))
    for kind in ("contiguous", "zigzag"):
        even = [length // ranks + (rank < length % ranks) for rank in range(ranks)]
        placement = Placement(tuple(even), kind)
        counted = torch.zeros_like(truth)
        for rank in range(ranks):
            rows = held(placement, rank).tolist()
            for source in range(ranks):
                key_rows = held(placement, source).tolist()
                for block in (block for blocks in result.branches for block in blocks):
                    for part in all_shares(block, placement, rank, source):
                        for i, h, j, _, times in shown_pairs(part):
                            counted[h, rows[i], key_rows[j]] += times
        assert torch.equal(counted, truth)


@pytest.mark.parametrize("is_causal", [False, True])
def test_weights_stand_where_later_branches_show_a_pair_again(is_causal):
    """Ranks whose borders the rate does not divide: the places modulo the rate begin anew on each."""
    shown = [brute.Shown(8, 1, None, is_causal), brute.Shown(32, 2, None, is_causal)]
    placement = Placement((5, 6, 21))
    with drawn.planned(counts_once=True, tile=1024):
        result = plan(drawn.pattern_of(shown, "multiset"), 2, 2, (0, 32), 1)
    assert result.counts_once
    counted = Counter()
    for rank in range(3):
        rows = held(placement, rank).tolist()
        for source in range(3):
            key_rows = held(placement, source).tolist()
            for block in (block for blocks in result.branches for block in blocks):
                for part in all_shares(block, placement, rank, source):
                    for i, _, j, g, times in shown_pairs(part):
                        counted[g, rows[i], key_rows[j]] += times * part.weight
    truth = Counter()
    for table in brute.counts(shown, "multiset", 32, 2):
        truth.update(map(tuple, table.nonzero().tolist()))
    assert counted == truth


def test_a_placement_carries_no_hash_to_another_process():
    placement = Placement((3, 4), "zigzag")
    hash(placement)
    assert "_hash" in vars(placement)
    copied = pickle.loads(pickle.dumps(placement))
    assert set(vars(copied)) == {"lengths", "kind", "listed"}
    assert copied == placement
    assert hash(copied) == hash(placement)
