"""Kept blocks: as many as were asked for, computed in few calls, and over ranks no key that nobody sees."""

from collections import Counter
from itertools import product

import drawn
import pytest
import torch
from brute import attention
from cells import held
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import tiered

from lightning_longnet import Branch, Pattern, SequenceShard, Sparsity, attend, explain, sequence_plan
from lightning_longnet.attention.kernels.sdpa import cpu
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.plan.blocks import plan
from lightning_longnet.attention.plan.paged_keys import PagedKeys
from lightning_longnet.planning.flops import attended_pairs

KINDS = ["local_window", "dilated_sparse", "global_local", "strided"]
OVER_RANKS = list(product([1, 2, 4], ["gather", "ring", "swap"], KINDS))
DILATED = Pattern.dilated((16, 32), (1, 2))
CAUSAL = Pattern.dilated((16, 32), (1, 2), is_causal=True)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    size=st.integers(1, 9),
    rows=st.integers(1, 300),
    ratio=st.floats(0.01, 1),
    some=st.integers(1, 40),
    is_causal=st.booleans(),
    varies=st.booleans(),
    head=st.integers(0, 9),
)
def test_the_ratio_is_that_of_the_blocks_that_stay(kind, size, rows, ratio, some, is_causal, varies, head):
    sparsity = Sparsity(kind, size, ratio, some, varies and kind in ("dilated_sparse", "strided"))
    kept = sparsity.kept(rows, head, is_causal)
    blocks = -(-rows // size)
    assert len(kept) == blocks
    for i, row in enumerate(kept):
        assert i in row
        assert list(row) == sorted(set(row))
        assert row[0] >= 0
        assert row[-1] <= (i if is_causal else blocks - 1)
    expected = ratio * (blocks * (blocks + 1) / 2 if is_causal else blocks**2)
    assert abs(sum(map(len, kept)) - expected) <= blocks
    if expected >= blocks and not is_causal:  # no more than own blocks are kept in any case
        assert abs(sum(map(len, kept)) - expected) <= 1
    if is_causal:  # what a block sees does not depend on what comes behind it
        assert sparsity.kept(-(-blocks // 2) * size, head, True) == kept[: -(-blocks // 2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("ratio", tiered([0.1, 0.25, 0.5], quick=[0.25]))
def test_the_density_of_the_mask_is_the_ratio(kind, is_causal, ratio):
    """Over what the whole pattern shows, within a row of blocks for each segment."""
    within = Pattern.dilated((128, 256), (1, 2), is_causal)
    sparse = Pattern.block_sparse(kind, 4, ratio, within=within)
    for one, whole in zip(sparse.branches, within.branches, strict=True):
        kept, of = (Pattern((branch,)).mask(512, 4).bool() for branch in (one, whole))
        assert not (kept & ~of).any()
        seen = torch.tensor([x[0, :: whole.dilation_rate, :: whole.dilation_rate].sum() for x in (kept, of)])
        segments, rows = 512 // whole.segment_length, 32
        blocks = rows * (rows + 1) // 2 if is_causal else rows**2
        # a causal block on the diagonal has 10 of its 16 pairs
        own = 6 * rows * segments if is_causal else 0
        measured = (seen + own) / (16 * blocks * segments)
        assert measured[1] == 1
        assert abs(measured[0] - ratio) <= rows / blocks


def test_what_each_kind_keeps():
    def kept(kind, ratio, head=0, **settings):
        return Sparsity(kind, 1, ratio, **settings).kept(12, head, False)

    assert kept("local_window", 0.25)[5] == (4, 5, 6)
    assert kept("dilated_sparse", 0.25)[5] == (1, 5, 9)
    assert kept("strided", 0.25)[5] == (4, 5, 7)  # its own, the nearest, and the nearest of every eighth
    assert kept("strided", 0.25)[11] == (7, 10, 11)
    assert kept("global_local", 0.25)[0] == tuple(range(12))
    assert {0, 5} <= set(kept("global_local", 0.25)[5])
    assert all(set(range(3)) <= set(row) for row in kept("local_window", 0.5, global_tokens=3))
    moved = [kept("dilated_sparse", 0.25, head, varies_over_heads=True)[5] for head in range(5)]
    assert moved[0] == moved[4] == (1, 5, 9)
    assert len(set(moved)) == 4


def shown(call):
    queries, keys = list(call.queries.elements()), list(call.keys.elements())
    group = call.queries.heads // call.keys.heads
    assert len(set(queries)) == len(queries)
    for n, (row, head) in enumerate(queries):
        rest, a = divmod(n, call.queries.rows)
        segment, h = divmod(rest, call.queries.heads)
        first = (segment * call.keys.heads + h // group) * call.keys.rows
        for b in range(call.keys.rows):
            if (call.low is None or a - b >= call.low) and (call.high is None or a - b <= call.high):
                yield head, row, keys[first + b][0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("within", [DILATED, CAUSAL], ids=["both ways", "causal"])
@pytest.mark.parametrize("length", [64, 77])
def test_gathered_calls_show_what_the_plan_shows(kind, within, length):
    pattern = Pattern.block_sparse(kind, 3, 0.4, within=within)
    result = plan(pattern, 4, 2, (0, length))
    assert any(isinstance(call.keys, PagedKeys) for calls in result.calls for call in calls)
    counted = Counter(pair for calls in result.calls for call in calls for pair in shown(call))
    mask = pattern.mask(length, 4, 2)
    assert counted == {pair: mask[pair].item() for pair in map(tuple, mask.nonzero().tolist())}
    assert sum(call.pairs for calls in result.calls for call in calls) == result.pairs


def test_queries_that_see_equally_many_blocks_are_one_call(monkeypatch):
    pattern = Pattern.block_sparse("strided", 64, 0.125, within=Pattern.dilated((4096,), (1,)))
    result = plan(pattern, 8, 8, (0, 16384))
    (calls,) = result.calls
    assert [len(call.queries.starts) for call in calls] == [256]
    assert len(result.branches[0]) > 50
    assert calls[0].queries.is_view
    assert calls[0].keys.rows == 8 * 64
    q = torch.randn(1, 1024, 1, 8)
    seen = []
    monkeypatch.setattr(cpu, "_forward", lambda *a, _run=cpu._forward, **s: (seen.append(a[0].shape), _run(*a, **s))[1])
    attend(q, q, q, Pattern.block_sparse("local_window", 64, 0.25, within=Pattern.dense()), kernel="sdpa")
    assert len(seen) <= 8 + 2  # cut to an eighth of the rows each


def step(group, tensors, placement, settings):
    at = held(placement, group.rank())
    leaves = [x[:, at].clone().requires_grad_() for x in tensors[:3]]
    shard = SequenceShard(group, len(at), placement.kind)
    out = attend(*leaves, shard=shard, **settings)
    return (out.detach(), *torch.autograd.grad(out, leaves, tensors[3][:, at])), shard.comm.sent_bytes


def needed(mask, placement, kv_heads, ranks):
    """Cells that each rank (first) sees of each other (second), by the definition."""
    of_heads = mask.unflatten(0, (kv_heads, -1)).any(1)
    rows = [held(placement, rank) for rank in range(ranks)]
    return [
        [int(of_heads[:, rows[a]][:, :, rows[b]].any(1).sum()) if a != b else 0 for b in range(ranks)]
        for a in range(ranks)
    ]


@pytest.mark.parametrize(
    ("world", "exchange", "kind"),
    tiered(OVER_RANKS, quick=OVER_RANKS[::3], covers=2),
)
def test_equals_its_mask_over_ranks_and_sends_what_is_seen(pool, kind, exchange, world):
    is_causal, varies = exchange == "ring", kind in ("dilated_sparse", "strided")
    pattern = Pattern.block_sparse(
        kind, 3, 0.35, within=CAUSAL if is_causal else DILATED, varies_over_heads=varies, global_tokens=4
    )
    tensors = [x.detach() for x in drawn.tensors((2, 67, 8, 4, 4))]
    lengths = {1: (67,), 2: (30, 37), 4: (20, 7, 31, 9)}[world]
    placement = Placement(lengths, "zigzag" if kind == "strided" else "contiguous")
    result = pool.run(world, step, tensors, placement, {"pattern": pattern, "exchange": exchange})
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    mask = pattern.mask(67, 8, 4)
    out, _ = attention(*leaves, [[mask[::2].double()]] * 2, 0.5)
    truth = (out, *torch.autograd.grad(out, leaves, tensors[3]))
    cells = needed(mask, placement, 4, world)
    assert world == 1 or sum(map(sum, cells)) > 0
    for rank, (ours, sent) in enumerate(result):
        at = held(placement, rank)
        for each, true in zip(ours, truth, strict=True):
            assert (each - true[:, at]).abs().max() <= 1e-10
        if exchange != "swap":
            rows_sent = sum(row[rank] for row in cells) * (2 if exchange == "ring" else 1) + sum(cells[rank])
            assert sent == rows_sent * 2 * 2 * 4 * 8  # samples, keys and values, width, bytes


def test_far_fewer_keys_travel_than_of_all_blocks():
    sparse = Pattern.block_sparse("local_window", 16, 0.1, within=Pattern.dense())
    sent = [
        sum(v.sent_bytes for v in sequence_plan(pattern, (512,) * 4, 4, exchange="gather").volumes)
        for pattern in (sparse, Pattern.dense())
    ]
    assert sent[0] < 0.15 * sent[1]


@pytest.mark.parametrize("kind", KINDS)
def test_is_written_as_plain_values_and_drawn(kind):
    pattern = Pattern.block_sparse(kind, 4, 0.3, within=CAUSAL)
    assert Pattern(**pattern.to_dict()) == pattern
    assert Pattern.loads(pattern.dumps()) == pattern
    assert hash(pattern) == hash(Pattern.loads(pattern.dumps()))
    assert f"0.3 of {kind} blocks of 4" in pattern.plot(32, 2).get_suptitle()
    assert f"0.3 of {kind} blocks of 4" in str(sequence_plan(pattern, (32, 32), 2))


def test_reach_knows_that_own_blocks_alone_cross_no_border():
    own = Pattern.block_sparse("local_window", 4, 0.05, within=Pattern.dilated((32,), (2,)))
    assert own.reach(64, 2).span == 8
    more = Pattern.block_sparse("local_window", 4, 0.5, within=Pattern.dilated((32,), (2,)))
    assert more.reach(64, 2).span == 32


def test_pairs_are_counted_by_the_mask():
    for multiplicity in ("multiset", "set"):
        within = Pattern.dilated((16, 32), (1, 2), True, multiplicity=multiplicity)
        pattern = Pattern.block_sparse("strided", 3, 0.4, within=within)
        counts = pattern.mask(64, 4)
        pairs = attended_pairs(pattern, 4, cuts=(0, 64))
        assert pairs.required == (counts > 0).sum()
        if multiplicity == "multiset":
            assert pairs.computed == counts.sum()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_call_is_the_same():
    pattern = Pattern.block_sparse("dilated_sparse", 4, 0.3, within=CAUSAL, varies_over_heads=True)
    q, k, v, grad = drawn.tensors((1, 48, 4, 2, 8))

    def call(q, k, v):
        return attend(2 * q, k, v, pattern) + 1

    results = []
    for each in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        out = each(q, k, v)
        results.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    torch.testing.assert_close(*results)


REFUSALS = {
    "an unknown kind": (lambda: Sparsity("random", 4, 0.5), "kind must be one of 'local_window', .* got 'random'"),
    "no rows": (lambda: Sparsity("strided", 0, 0.5), "block_size must be an integer, at least 1, got 0"),
    "nothing kept": (lambda: Sparsity("strided", 4, 0), "sparsity_ratio must be .* more than 0 and at most 1, got 0"),
    "a percentage": (lambda: Sparsity("strided", 4, 10), "at most 1, got 10"),
    "no global row": (lambda: Sparsity("global_local", 4, 0.1, 0), "global_tokens must be an integer, at least 1"),
    "the same for all heads": (
        lambda: Sparsity("local_window", 4, 0.1, varies_over_heads=True),
        "varies_over_heads needs a kind that can be moved, 'dilated_sparse' or 'strided', got 'local_window'",
    ),
    "a window": (
        lambda: Pattern.block_sparse("strided", 4, 0.5, within=Pattern.window(8)),
        "sparsity must be None where there is a window, got both, window 8: the kind 'local_window' keeps",
    ),
    "blocks of blocks": (
        lambda: Pattern.block_sparse(
            "strided", 4, 0.5, within=Pattern((Branch(sparsity=Sparsity("strided", 2, 0.5)),))
        ),
        "within must keep all of its blocks",
    ),
    "a branch": (lambda: Pattern.block_sparse("strided", 4, 0.5, within=Branch(4)), "within must be a Pattern"),
    "an unknown key": (
        lambda: Branch(sparsity={"kind": "strided", "block": 4}),
        "sparsity must be a Sparsity or a dictionary of kind, block_size, .* got",
    ),
}


@pytest.mark.parametrize(("make", "words"), REFUSALS.values(), ids=REFUSALS)
def test_what_makes_no_sense_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_products_serve_where_few_keys_are_kept():
    q = torch.zeros(1, 64, 2, 8)
    whole = Pattern.dilated((1024, 4096), (1, 2))
    few, many = (Pattern.block_sparse("strided", 128, ratio, within=whole) for ratio in (0.25, 0.26))
    assert [explain(q, q, q, pattern).chosen for pattern in (few, many, whole)] == ["eager", "sdpa", "sdpa"]
    assert explain(q, q, q, few + whole).chosen == "sdpa"
    assert explain(q, q, q, few, kernel="sdpa").chosen == "sdpa"
