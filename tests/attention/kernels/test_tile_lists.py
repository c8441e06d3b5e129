"""The tile lists of the kernel "triton", by integers alone: each pair as often as the definition says, both ways."""

from itertools import pairwise
from time import process_time

import brute
import drawn
import pytest
import torch
from brute import Shown
from cells import held
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_longnet import Pattern
from lightning_longnet.attention.kernels.triton.rectangles import phases
from lightning_longnet.attention.kernels.triton.tile_list import tile_list
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.parallel.rank_blocks import Layout
from lightning_longnet.attention.parallel.routes import head_parts, route
from lightning_longnet.attention.plan.blocks import plan


def level(place, every):
    return sum(((place % n == 0).long() for n in every), torch.zeros_like(place))


def add_pairs(counts, phase, rows, others, transposed):
    """Add each pair as often as the programs of a launch count it; counts are (heads, query rows, key rows)."""
    steps, rectangles = (phase.step, phase.key_step), phase.rectangles
    if transposed:
        steps, rectangles = steps[::-1], rectangles.transposed()
    items, spans = (x.tolist() for x in tile_list(rectangles, steps, rows, others, phase.every))
    computed = set()
    for head, row, count, first, last in items:
        assert 0 < count <= rows
        assert first < last
        x = torch.arange(rows)
        own = row + x * steps[0]
        cells = {(head, r) for r in own[:count].tolist()}
        assert len(cells) == count
        assert not cells & computed, "two items write one row"
        computed |= cells
        for start, n, low, high, full_first, full_last, place, other_place, weight in spans[first:last]:
            for tile in range(-(-n // others)):
                y = tile * others + torch.arange(others)
                distance = x[:, None] - y
                seen = (distance >= low) & (distance <= high) & (y < n)
                if full_first <= tile < full_last:
                    assert seen[:count].all(), "a tile without a mask has a pair that must be hidden"
                times = 1 + torch.minimum(level(x + place, phase.every)[:, None], level(y + other_place, phase.every))
                a, b = torch.broadcast_tensors(own[:, None], start + y * steps[1])
                kept = seen & (x < count)[:, None]
                a, b, times = a[kept], b[kept], (weight * times)[kept]
                if transposed:
                    a, b = b, a
                if phase.received is not None:
                    b = phase.received[b].long()
                counts[head].index_put_((a, b), times.double(), accumulate=True)


def assert_whole(pattern, tables, kv_heads, group, cuts, tiles, weighted):
    """The lists of whole sequences count each pair as the tables do."""
    result = plan(pattern, kv_heads * group, kv_heads, cuts, int(weighted))
    for transposed in (False, True):
        counted = torch.zeros_like(tables[0])
        for phase in phases(result.parts, group):
            add_pairs(counted, phase, *tiles, transposed)
        assert torch.equal(counted, sum(tables))


SHOWN = drawn.nested_branches() | st.lists(drawn.branches(), min_size=1, max_size=4)
TILES = st.tuples(st.sampled_from([1, 2, 4, 16]), st.sampled_from([1, 2, 4, 8]))


@settings(max_examples=150, deadline=None)
@given(
    shown=SHOWN,
    multiplicity=st.sampled_from(["multiset", "set"]),
    kv_heads=st.integers(1, 5),
    group=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    tiles=TILES,
    weighted=st.booleans(),
)
@example([Shown(8), Shown(16, 2), Shown(32, 4)], "multiset", 2, 2, [37, 5], (4, 2), True)
@example([Shown(5, 2), Shown(9, 3, causal=True)], "set", 2, 1, [33], (4, 4), False)  # blocks of negative weight
@example([Shown(12, 1, sparsity=("strided", 2, 0.35, 0, True))], "multiset", 2, 1, [30], (4, 2), False)
@example([Shown(20, 2, window=5, causal=True)], "multiset", 3, 2, [40], (4, 2), False)
def test_each_pair_as_often_as_the_definition(shown, multiplicity, kv_heads, group, lengths, tiles, weighted):
    cuts = (0, *torch.tensor(lengths).cumsum(0).tolist())
    ids = [i for i, (a, b) in enumerate(pairwise(cuts)) for _ in range(b - a)]
    tables = brute.counts(shown, multiplicity, cuts[-1], kv_heads, ids)
    with drawn.planned(weighted, 1024):
        assert_whole(drawn.pattern_of(shown, multiplicity), tables, kv_heads, group, cuts, tiles, weighted)


@settings(max_examples=100, deadline=None)
@given(
    shown=SHOWN,
    multiplicity=st.sampled_from(["multiset", "set"]),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    documents=st.lists(st.integers(1, 16), min_size=1, max_size=3),
    cut=st.lists(st.integers(0, 40), min_size=0, max_size=4),
    kind=st.sampled_from(["contiguous", "zigzag"]),
    tiles=TILES,
    weighted=st.booleans(),
)
def test_each_pair_of_a_rank_with_received_keys(shown, multiplicity, heads, documents, cut, kind, tiles, weighted):
    """Of this rank's keys and of those that a gather or a ring brings."""
    kv_heads, group = heads
    cuts = (0, *torch.tensor(documents).cumsum(0).tolist())
    length = cuts[-1]
    borders = sorted(min(c, length) for c in cut)
    placement = Placement(tuple(b - a for a, b in zip([0, *borders], [*borders, length], strict=True)), kind)
    pattern = drawn.pattern_of(shown, multiplicity)
    layout = Layout(pattern, kv_heads * group, kv_heads, cuts, placement, int(weighted))
    ids = [i for i, n in enumerate(documents) for _ in range(n)]
    truth = sum(brute.counts(shown, multiplicity, length, kv_heads, ids))
    with drawn.planned(weighted, 1024):
        for exchange in ("gather", "ring"):
            for transposed in (False, True):
                for rank in range(placement.ranks):
                    result = _counts_on_rank(layout, rank, (exchange,) * len(shown), group, tiles, transposed)
                    assert torch.equal(result, truth[:, held(placement, rank)])


def _counts_on_rank(layout, rank, exchanges, group, tiles, transposed):
    """Return (heads, the rank's queries, all keys) of how often the launches of a rank count each pair."""
    placement, kv_heads = layout.placement, layout.kv_heads
    here, mine = route(layout, rank, exchanges), held(placement, rank)
    total = torch.zeros(kv_heads, len(mine), placement.length, dtype=torch.float64)
    own = torch.zeros(kv_heads, len(mine), len(mine), dtype=torch.float64)
    for phase in phases(here.own, group):
        add_pairs(own, phase, *tiles, transposed)
    total[:, :, mine] += own
    for step in here.rounds:
        indices = step.indices()
        counts = [len(rows) for rows in indices.receive.values()]
        got = torch.zeros(kv_heads, len(mine), sum(counts), dtype=torch.float64)
        for phase in phases(indices.parts, group, counts):
            add_pairs(got, phase, *tiles, transposed)
        rows = [
            (held(placement, peer)[row // kv_heads], row % kv_heads)
            for peer, indexed in indices.receive.items()
            for row in indexed.tolist()
        ]
        for n, (token, head) in enumerate(rows):
            others = [g for g in range(kv_heads) if g != head]
            assert not got[others, :, n].any(), "a head reads a row of another head"
            total[head, :, token] += got[head, :, n]
    return total


def test_each_pair_of_the_heads_of_a_rank_after_a_swap():
    pattern = Pattern.dilated((8, 16, 32), (1, 2, 4), is_causal=True)
    truth = sum(brute.counts([Shown(8 * r, r, causal=True) for r in (1, 2, 4)], "multiset", 40, 4))
    layout = Layout(pattern, 8, 4, (0, 40), Placement((10,) * 4), 1)
    for rank in range(2):
        heads = range(rank * 2, rank * 2 + 2)
        counted = torch.zeros(2, 40, 40, dtype=torch.float64)
        for phase in phases(head_parts(layout, heads), 2):
            add_pairs(counted, phase, 8, 4, False)
        assert torch.equal(counted, truth[heads])


def test_longnet_computes_few_positions_beside_its_pairs():
    """Of the positions that are multiplied, in tiles of 128 queries and 64 keys, most are pairs of the pattern."""
    pattern = Pattern.dilated((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16), is_causal=True)
    result = plan(pattern, 16, 16, (0, 65536), 1)
    positions = launches = 0
    for phase in phases(result.parts, 1):
        items, spans = tile_list(phase.rectangles, (phase.step, phase.step), 128, 64, phase.every)
        positions += int(((spans[:, 1] + 63) // 64).sum()) * 128 * 64
        launches += 1
        assert (items[:, 2] == 128).all()
    assert launches == 5
    assert result.pairs / positions > 0.93


@pytest.mark.long
def test_the_lists_of_a_million_tokens_are_made_in_seconds():
    pattern = Pattern.dilated([2048 * 2**i for i in range(5)], [2**i for i in range(5)], True)
    result = plan(pattern, 16, 16, (0, 1 << 20), 1)
    begin = process_time()
    size = 0
    for phase in phases(result.parts, 1):
        for rectangles in (phase.rectangles, phase.rectangles.transposed()):
            lists = tile_list(rectangles, (phase.step, phase.step), 128, 64, phase.every)
            size += sum(x.numel() * x.element_size() for x in lists)
    assert process_time() - begin < 10
    assert size < 0.02 * 16 * (1 << 20) * 64 * 2 * 3  # beside q, k and v of 64 numbers a head in bfloat16
