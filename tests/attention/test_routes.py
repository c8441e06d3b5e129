"""Which rows travel: exactly those that a query sees and its rank does not hold, each once."""

import gc
import random
import weakref
from unittest.mock import patch

import brute
import drawn
import pytest
import torch
from brute import Shown
from cells import held
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import tiered

from lightning_longnet import Pattern, sequence_plan
from lightning_longnet.attention.parallel.exchange import MESSAGE_BYTES, Sizes
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.parallel.rank_blocks import Layout, is_local, rank_blocks
from lightning_longnet.attention.parallel.routes import route
from lightning_longnet.attention.parallel.schedule import exchange_plan, schedule
from lightning_longnet.attention.parallel.shares import BlockShares

SIZES = Sizes(batch=1, head_dim=64, value_dim=64, itemsize=4, wide_itemsize=4)


@settings(max_examples=150, deadline=None)
@given(
    shown=drawn.nested_branches() | st.lists(drawn.branches(), min_size=1, max_size=3),
    multiplicity=st.sampled_from(["multiset", "set"]),
    kv_heads=st.integers(1, 3),
    documents=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    cut=st.lists(st.integers(0, 40), min_size=0, max_size=5),
    kind=st.sampled_from(["contiguous", "zigzag"]),
)
def test_no_row_travels_that_nobody_sees_and_none_twice(shown, multiplicity, kv_heads, documents, cut, kind):
    cuts = (0, *torch.tensor(documents).cumsum(0).tolist())
    length = cuts[-1]
    borders = sorted(min(c, length) for c in cut)
    placement = Placement(tuple(b - a for a, b in zip([0, *borders], [*borders, length], strict=True)), kind)
    layout = Layout(drawn.pattern_of(shown, multiplicity), kv_heads, kv_heads, cuts, placement)
    ids = [i for i, n in enumerate(documents) for _ in range(n)]
    seen = sum(brute.counts(shown, multiplicity, length, kv_heads, ids)) > 0
    moved = 0
    for exchange in ("gather", "ring"):
        result = [route(layout, rank, (exchange,) * len(shown)).rounds for rank in range(placement.ranks)]
        sets = [[each.indices() for each in rounds] for rounds in result]
        for rank, own in enumerate(sets):
            received = {}
            for each in own:
                assert all(len(cells) for cells in (*each.send.values(), *each.receive.values()))
                if exchange == "ring":
                    ranks = placement.ranks
                    turns = {(rank - r) % ranks for r in each.receive} | {(r - rank) % ranks for r in each.send}
                    assert len(turns) == 1
                    assert max(len(each.receive), len(each.send)) == 1  # a chunk a round
                received |= each.receive
                for peer, cells in each.send.items():
                    theirs = [r.receive[rank] for r in sets[peer] if rank in r.receive]
                    assert len(theirs) == 1
                    assert torch.equal(theirs[0], cells)
            assert len(own) <= (1 if exchange == "gather" else placement.ranks - 1)
            for source in range(placement.ranks):
                if source != rank:
                    needed = seen[:, held(placement, rank)][:, :, held(placement, source)].any(1)
                    cells = {row * kv_heads + head for head, row in needed.nonzero().tolist()}
                    assert set(received.get(source, torch.empty(0)).tolist()) == cells
                    assert len(received.get(source, ())) == len(cells)
                    moved += len(cells)
    assert is_local(layout) == (moved == 0)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_closed_form_of_nested_branches(is_causal):
    """Where a rank's tokens divide every segment, a rank receives a number of rows that no world changes."""
    w, r, kv_heads, here = (64, 128, 512, 1024), (1, 2, 4, 8), 8, 128
    rows = sum(max(0, b - max(a, here)) // rate for a, b, rate in zip((0, *w), w, r, strict=False))
    for ranks in (8, 16, 64):
        layout = Layout(Pattern.dilated(w, r, is_causal), 8, kv_heads, (0, here * ranks), Placement((here,) * ranks))
        received = [
            sum(len(c) for each in route(layout, rank, ("gather",) * 4).rounds for c in each.indices().receive.values())
            for rank in (7, ranks - 1, ranks - 8)
        ]
        # causal: the last rank of a segment receives everything, the first one nothing
        assert received == [rows * kv_heads, rows * kv_heads, 0 if is_causal else rows * kv_heads]


def test_nothing_travels_while_segments_end_where_ranks_do():
    layout = Layout(Pattern.dilated((64, 128), (1, 2), True), 4, 4, (0, 1024), Placement((256,) * 4))
    assert is_local(layout)
    assert all(exchange_plan(layout, ("gather",) * 2).volume(rank, SIZES) == (0, 0, 0, 0) for rank in range(4))
    assert schedule(layout, "auto", SIZES).why == "nothing has to travel"


def test_auto_says_why():
    few = Layout(Pattern.dilated((64, 512), (1, 8), True), 8, 8, (0, 512), Placement((128,) * 4))
    chosen = schedule(few, "auto", SIZES)
    assert chosen.exchanges == ("gather", "gather")
    assert chosen.why.startswith("gather sends least")
    assert "swap " in chosen.why
    dense = Layout(Pattern.dense(True), 8, 8, (0, 65536), Placement((8192,) * 8))
    chosen = schedule(dense, "auto", SIZES)
    assert chosen.exchanges == ("swap",)  # every key goes everywhere: to trade heads is cheaper
    dense = dense._replace(heads=3, kv_heads=3)
    chosen = schedule(dense, "auto", SIZES)
    assert chosen.exchanges == ("ring",)  # too much to keep
    assert "swap is refused: swap needs key heads that 8 ranks divide, got 3" in chosen.why
    assert "gather would keep 7.0 times the own keys" in chosen.why


def test_what_cannot_be_had_is_refused_with_the_reason():
    layout = Layout(Pattern.dense(), 3, 3, (0, 64), Placement((32, 32)))
    with pytest.raises(ValueError, match="swap needs key heads that 2 ranks divide, got 3: use 'gather' or 'ring'"):
        schedule(layout, "swap", SIZES)
    with pytest.raises(ValueError, match="'local' needs every query's keys on its own rank, and some are elsewhere"):
        schedule(layout, "local", SIZES)
    with pytest.raises(
        ValueError, match="exchange must be one of 'auto', 'local', 'gather', 'ring', 'swap', got 'all'"
    ):
        schedule(layout, "all", SIZES)


def test_shown_twice_travels_once():
    shown = [Shown(8, 1), Shown(16, 1)]
    layout = Layout(drawn.pattern_of(shown, "multiset"), 1, 1, (0, 16), Placement((6, 10)))
    (each,) = route(layout, 1, ("gather", "gather")).rounds
    assert each.indices().receive[0].tolist() == [0, 1, 2, 3, 4, 5]


def uneven(rng):
    """A layout of many ranks, unequal lengths and documents."""
    lengths = tuple(rng.choice([0, 5, 16, 40]) for _ in range(rng.choice([3, 9, 20])))
    cuts, length = [0], sum(lengths)
    while cuts[-1] < length:
        cuts.append(min(length, cuts[-1] + rng.randint(1, 60)))
    pattern = rng.choice([Pattern.dense(True), Pattern.dilated((8, 32, 64), (1, 2, 4), rng.random() < 0.5)])
    return Layout(
        pattern, 2, 2, tuple(cuts) if length else (0, 0), Placement(lengths, rng.choice(["contiguous", "zigzag"]))
    )


@pytest.mark.parametrize("seed", tiered(range(20), quick=range(8)))
def test_the_volume_is_that_of_the_route(seed):
    """Rows are counted for all ways at once, a route is made for one of them."""
    layout = uneven(random.Random(seed))
    for way in (("gather", "ring", "ring"), ("gather", "gather", "ring"), ("ring",) * 3, ("gather",) * 3):
        exchanges = way[: len(layout.pattern.branches)]
        for rank in range(layout.placement.ranks):
            result = exchange_plan(layout, exchanges).volume(rank, SIZES)
            sent = messages = kept = forward = 0
            for each in route(layout, rank, exchanges).rounds:
                at, fetches = each.indices(), 1 if each.saves_rows else 2
                out, come = (sum(map(len, cells.values())) for cells in (at.send, at.receive))
                sent += 128 * 4 * (fetches * out + come)
                forward += 128 * 4 * out
                messages += fetches * len(at.send) + len(at.receive)
                kept += each.saves_rows * 128 * 4 * come
            assert result == (sent, messages, kept, forward)


def test_auto_keeps_no_more_than_it_may_on_any_rank():
    """Documents of their own on the first, the middle and the last rank hide what the others would keep."""
    for ranks, documents in ((8, (1, 3, 1, 2, 1)), (40, (1, 19, 1, 18, 1))):
        here = 4096
        planned = sequence_plan(Pattern.dense(True), (here,) * ranks, 7, documents=[here * n for n in documents])
        assert planned.schedule.exchanges == ("ring",)
        asked = sequence_plan(
            Pattern.dense(True), (here,) * ranks, 7, documents=[here * n for n in documents], exchange="gather"
        )
        assert max(v.kept_bytes for v in asked.volumes) > here * 7 * 128 * 4


def test_auto_weighs_messages_and_takes_the_way_with_fewest_rings():
    one = Layout(Pattern.dilated((64, 512), (1, 1), True), 3, 3, (0, 512), Placement((128,) * 4))
    for way in (("gather",) * 2, ("ring",) * 2):
        planned = exchange_plan(one, way).volume(3, SIZES)
        assert planned.cost == planned.sent_bytes + planned.messages * MESSAGE_BYTES
    # nothing of the first branch travels: to gather it or to ring it costs the same
    assert schedule(one, "auto", SIZES).exchanges == ("gather", "ring")


def test_a_shard_of_other_documents_leaves_nothing_behind():
    """What is worked out for a batch goes with it: of many thousand rows that travel, no index stays."""
    where, before = Placement((4096,) * 8), integers()
    for i in range(12):
        layout = Layout(Pattern.dense(True), 8, 8, (0, 1000 + i, where.length), where)
        schedule(layout, "auto", SIZES)
        result = route(layout, 7, ("ring",))
        assert len(result.rounds) == 7
        assert result.rounds[0].indices() is not result.rounds[0].indices()
        held = weakref.ref(result)
    del result
    gc.collect()
    assert held() is None
    assert integers() - before < 4096


def integers():
    """The number of elements of all integer tensors of this process."""
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.dtype in (torch.int32, torch.int64)]
    return sum(x.numel() for x in alive)


def test_many_documents_on_many_ranks_are_planned_at_once():
    """Each rank is compared with those that its documents reach, and each pair of ranks with the blocks of its rows."""
    rng = random.Random(0)
    cuts = [0]
    while cuts[-1] < 2**20:
        cuts.append(min(2**20, cuts[-1] + rng.randint(1, 4000)))
    layout = Layout(Pattern.dense(True), 8, 8, tuple(cuts), Placement((2048,) * 512))
    between = rank_blocks(layout)
    assert max(len(between.possible_peers(rank)) for rank in range(512)) < 8
    asked, shares = [], BlockShares.between
    with patch.object(BlockShares, "between", lambda *a: (asked.append(a), shares(*a))[1]):
        route(layout, 256, ("gather",))
        assert len(asked) < 100
        assert not is_local(layout)
        assert len(asked) < 200


def test_few_cells_are_listed_as_a_mask_shows_them():
    pattern = Pattern.dilated((64, 1024, 4096), (1, 32, 64), is_causal=True)
    layout = Layout(pattern, 4, 2, (0, 4096), Placement((1024,) * 4))
    expected = rank_blocks(layout).blocks(3, 0)
    assert expected.is_sparse
    assert expected.kv_rows_without_mask().tolist() == expected.kv_rows().tolist()
    assert expected.kv_row_count() == len(expected.kv_rows()) > 0
    near = rank_blocks(layout).blocks(0, 0)
    assert not near.is_sparse
    assert near.kv_row_count() == len(near.kv_rows()) == len(near.kv_rows_without_mask())
    assert near.kv_rows_without_mask((1,)).tolist() == near.mask((1,)).nonzero().flatten().tolist()
