"""The tile lists of the kernel "triton", by integers alone: each pair as often as the definition says, both ways."""

from contextlib import contextmanager
from dataclasses import replace
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
from lightning_longnet.attention.kernels.null_keys import NullKeys
from lightning_longnet.attention.kernels.pair_options import PairOptions
from lightning_longnet.attention.kernels.partial import Partial, finalized, merge_branches
from lightning_longnet.attention.kernels.triton import joined
from lightning_longnet.attention.kernels.triton.rectangles import phases
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.parallel.rank_blocks import Layout
from lightning_longnet.attention.parallel.routes import heads_route, route
from lightning_longnet.attention.plan.blocks import UNCUT, plan


def level(place, every):
    return sum(((place % n == 0).long() for n in every), torch.zeros_like(place))


def add_pairs(counts, launch, tile, transposed, hidden=None):
    """Add each pair as often as the programs of a launch count it; counts are (heads, query rows, key rows).

    `hidden` says of each key row whether padding masks it, as the programs read it at the row of a key.
    """
    (phase, (items, spans)), (rows, others) = launch, tile
    computed, spans = set(), spans.tolist()
    for head, row, step, count, first, last in items.tolist():
        assert 0 < count <= rows
        assert first < last
        x = torch.arange(rows)
        own = row + x * step
        cells = {(head, r) for r in own[:count].tolist()}
        assert len(cells) == count
        assert not cells & computed, "two items write one row"
        computed |= cells
        for span in spans[first:last]:
            start, other_step, n, multiple, low, high, full_first, full_last, *places, unit, least, weight = span
            for tile in range(-(-n // others)):
                y = tile * others + torch.arange(others)
                distance = (multiple * x)[:, None] - y
                seen = (distance >= low) & (distance <= high) & (y < n)
                if full_first <= tile < full_last:
                    assert seen[:count].all(), "a tile without a mask has a pair that must be hidden"
                levels = level(x * multiple * unit + places[0], phase.every), level(y * unit + places[1], phase.every)
                times = 1 - least + torch.minimum(levels[0][:, None], levels[1])
                a, b = torch.broadcast_tensors(own[:, None], start + y * other_step)
                kept = seen & (x < count)[:, None]
                assert (times[kept] > 0).all()
                a, b, times = a[kept], b[kept], (weight * times)[kept]
                if transposed:
                    a, b = b, a
                if phase.received is not None:
                    b = phase.received[b].long()
                if hidden is not None:
                    a, b, times = (part[~hidden[b]] for part in (a, b, times))
                counts[head].index_put_((a, b), times.double(), accumulate=True)


@contextmanager
def joining(joins):
    """Have one launch hold all branches wherever it can (`joins`), or never."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joined, "MOST_POSITIONS", 1e9 if joins else 0)
        yield


def counted(parts, group, tile, transposed, like, hidden=None, sources=()):
    """Return how often the launches of parts count each pair, as a table like `like`."""
    counts = torch.zeros_like(like, dtype=torch.float64)
    for launch in joined.tiled_phases(phases(parts, group, sources), *tile, transposed, joins=True):
        add_pairs(counts, launch, tile, transposed, hidden)
    return counts


def tables_of(shown, multiplicity, length, kv_heads, ids, hidden):
    """Return how often the definition counts each pair, (Hkv, N, N), and how many zero keys of a segment, (Hkv, N)."""
    total = sum(brute.padded(brute.counts(shown, multiplicity, length, kv_heads, ids), hidden))
    return total[..., :length], total[..., length:].sum(-1)


def logits_of(partial, pattern, cuts, group, kv_heads, sinks):
    """Merge zero keys and sinks of this many keys into a partial of scores of 0; return the number of keys, (N, H)."""
    null_keys = NullKeys(pattern, cuts, torch.arange(cuts[-1]), kv_heads * group, kv_heads)
    options = PairOptions(1.0, null_keys=null_keys)
    merged = finalized(merge_branches([partial], options), partial.out, sinks.log())
    return merged.lse[0].T.exp()


@st.composite
def shown_branches(draw):
    """Draw branches, of which some pad their segments with keys of zeros, and a multiplicity."""
    shown = draw(drawn.nested_branches() | st.lists(drawn.branches(), min_size=1, max_size=4))
    multiplicity = draw(st.sampled_from(["multiset", "set"]))
    if multiplicity == "multiset":
        plain = st.sampled_from(["exact", "zero_keys"])
        shown = [b if b.window or b.sparsity else replace(b, ragged=draw(plain)) for b in shown]
    return shown, multiplicity


TILES = st.tuples(st.sampled_from([1, 2, 4, 16]), st.sampled_from([1, 2, 4, 8]))
NESTED = [Shown(8), Shown(16, 2), Shown(32, 4)]


@settings(max_examples=80, deadline=None)
@given(
    case=shown_branches(),
    kv_heads=st.integers(1, 5),
    group=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    tile=TILES,
    weighted=st.sampled_from([0, 1, UNCUT]),
    joins=st.booleans(),
    data=st.data(),
)
@example((NESTED, "multiset"), 2, 2, [37, 5], (4, 2), 1, False, None)
@example(
    ([Shown(3, 4, sparsity=("local_window", 1, 0.05, 0, False)), Shown(None)], "multiset"),
    1,
    1,
    [9],
    (1, 1),
    0,
    False,
    None,
)
@example((NESTED, "multiset"), 2, 2, [37, 5], (4, 2), UNCUT, True, None)
@example(([replace(b, causal=True) for b in NESTED], "multiset"), 4, 1, [64], (4, 2), UNCUT, True, None)
@example(([Shown(12), Shown(36, 3)], "multiset"), 3, 1, [70, 36], (4, 2), UNCUT, True, None)
@example(([Shown(8, 2), Shown(24, 3)], "multiset"), 6, 1, [50], (4, 2), 0, True, None)  # rates without a common row
@example(([Shown(5, 2), Shown(9, 3, causal=True)], "set"), 2, 1, [33], (4, 4), 0, False, None)  # negative weights
@example(([Shown(5, 2), Shown(9, 3, causal=True)], "set"), 2, 1, [33], (4, 4), 0, True, None)
@example(([Shown(12, 1, sparsity=("strided", 2, 0.35, 0, True))], "multiset"), 2, 1, [30], (4, 2), 0, False, None)
@example(([Shown(20, 2, window=5, causal=True)], "multiset"), 3, 2, [40], (4, 2), 0, False, None)
@example(([replace(b, ragged="zero_keys") for b in NESTED], "multiset"), 2, 2, [37, 5], (4, 2), UNCUT, True, None)
def test_each_pair_as_often_as_the_definition(case, kv_heads, group, lengths, tile, weighted, joins, data):
    """By queries and by keys, without those that padding hides; zero keys and sinks as often as it says, too."""
    (shown, multiplicity), cuts = case, (0, *torch.tensor(lengths).cumsum(0).tolist())
    ids = [i for i, (a, b) in enumerate(pairwise(cuts)) for _ in range(b - a)]
    (hidden,), sinks = [[i % 5 == 3 for i in range(cuts[-1])]], torch.arange(kv_heads * group, dtype=torch.float64)
    if data is not None:
        (hidden,) = data.draw(drawn.padding(1, cuts[-1])) or [[False] * cuts[-1]]
    truth, zero_keys = tables_of(shown, multiplicity, cuts[-1], kv_heads, ids, hidden)
    pattern, hidden = drawn.pattern_of(shown, multiplicity), torch.tensor(hidden)
    with drawn.planned(bool(weighted), 1024), joining(joins):
        parts = plan(pattern, kv_heads * group, kv_heads, cuts, weighted).parts
        for transposed in (False, True):
            pairs = counted(parts, group, tile, transposed, truth, hidden)
            assert torch.equal(pairs, truth)
    per_query = pairs.sum(-1).T.repeat_interleave(group, -1)[None, ..., None]
    partial = Partial(torch.zeros_like(per_query), per_query.log())
    keys = logits_of(partial, pattern, cuts, group, kv_heads, sinks)
    torch.testing.assert_close(keys, (truth.sum(-1) + zero_keys).T.repeat_interleave(group, -1) + sinks)


@settings(max_examples=100, deadline=None)
@given(
    case=shown_branches(),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    documents=st.lists(st.integers(1, 16), min_size=1, max_size=3),
    cut=st.lists(st.integers(0, 40), min_size=0, max_size=4),
    kind=st.sampled_from(["contiguous", "zigzag"]),
    tile=TILES,
    weighted=st.sampled_from([0, 1, UNCUT]),
    data=st.data(),
)
def test_each_pair_of_a_rank_with_received_keys(case, heads, documents, cut, kind, tile, weighted, data):
    """Of this rank's keys and of those that a gather or a ring brings."""
    (kv_heads, group), (shown, multiplicity) = heads, case
    cuts = (0, *torch.tensor(documents).cumsum(0).tolist())
    length = cuts[-1]
    borders = sorted(min(c, length) for c in cut)
    placement = Placement(tuple(b - a for a, b in zip([0, *borders], [*borders, length], strict=True)), kind)
    pattern = drawn.pattern_of(shown, multiplicity)
    layout = Layout(pattern, kv_heads * group, kv_heads, cuts, placement, weighted)
    ids = [i for i, n in enumerate(documents) for _ in range(n)]
    (hidden,) = data.draw(drawn.padding(1, length)) or [[False] * length]
    truth, _ = tables_of(shown, multiplicity, length, kv_heads, ids, hidden)
    exchange, transposed, joins = (data.draw(st.sampled_from(x)) for x in (("gather", "ring"), (False, True), (0, 1)))
    with drawn.planned(bool(weighted), 1024), joining(joins):
        for rank in range(placement.ranks):
            exchanges = (exchange,) * len(shown)
            result = _counts_on_rank(layout, rank, exchanges, group, tile, transposed, torch.tensor(hidden))
            assert torch.equal(result, truth[:, held(placement, rank)])


def _counts_on_rank(layout, rank, exchanges, group, tile, transposed, hidden):
    """Return (heads, the rank's queries, all keys) of how often the launches of a rank count each pair."""
    placement, kv_heads = layout.placement, layout.kv_heads
    here, mine = route(layout, rank, exchanges), held(placement, rank)
    total = torch.zeros(kv_heads, len(mine), placement.length, dtype=torch.float64)
    total[:, :, mine] += counted(here.own, group, tile, transposed, total[:, :, mine], hidden[mine])
    for step in here.rounds:
        indices = step.indices()
        sources = [len(rows) for rows in indices.receive.values()]
        rows = [
            (held(placement, peer)[row // kv_heads], row % kv_heads)
            for peer, indexed in indices.receive.items()
            for row in indexed.tolist()
        ]
        like, masked = total.new_zeros(*total.shape[:2], sum(sources)), torch.tensor([bool(hidden[t]) for t, _ in rows])
        got = counted(indices.parts, group, tile, transposed, like, masked, sources)
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
        pairs = counted(heads_route(layout, heads).own, 2, (8, 4), False, truth[heads])
        assert torch.equal(pairs, truth[heads])


LONGNET = Pattern.dilated((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16), is_causal=True)


@pytest.mark.parametrize(("joins", "launches", "share"), [(False, 5, 0.95), (True, 1, 0.85)])
def test_longnet_computes_few_positions_beside_its_pairs(joins, launches, share):
    """Of the positions that are multiplied, in tiles of 128 queries and 64 keys, most are pairs of the pattern."""
    result = plan(LONGNET, 16, 16, (0, 65536), UNCUT)
    launched = joined.tiled_phases(phases(result.parts, 1), 128, 64, False, joins)
    for _, (items, _) in launched:
        assert (items[:, 3] == 128).all()
    assert len(launched) == launches
    assert result.pairs / sum(tiles.positions(128, 64) for _, tiles in launched) > share


def test_branches_are_joined_where_that_costs_few_positions():
    """Segments of 64 rows have 4 of a rate of 16, so that most rows of an item would be idle."""
    for segments, rates, launches in (
        ((2048, 4096), (1, 2), 1),
        ((64, 256, 1024), (1, 4, 16), 3),
        ((4096, 4096), (8, 9), 2),
        ((4096, 4096), (64, 127), 2),
    ):
        for by_key in (False, True):
            parts = plan(Pattern.dilated(segments, rates), 4, 4, (0, 16384), UNCUT).parts
            assert len(joined.tiled_phases(phases(parts, 1), 128, 64, by_key, joins=True)) == launches


@pytest.mark.long
def test_the_lists_of_a_million_tokens_are_made_in_seconds():
    result = plan(LONGNET, 16, 16, (0, 1 << 20), UNCUT)
    begin = process_time()
    size = 0
    for by_key in (False, True):
        ((_, lists),) = joined.tiled_phases(phases(result.parts, 1), 128, 64, by_key, joins=True)
        size += sum(x.numel() * x.element_size() for x in lists)
    assert process_time() - begin < 10
    assert size < 0.02 * 16 * (1 << 20) * 64 * 2 * 3  # beside q, k and v of 64 numbers a head in bfloat16
