"""Attention over ranks against the brute force: every exchange and placement, on 1 to 8 processes."""

from itertools import product
from unittest.mock import patch

import drawn
import pytest
import torch
from cells import held
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pool import WORLDS
from split import LONGNET, compare, side_by_side, split_cases, step, whole
from tiers import tiered

from lightning_longnet import Branch, Pattern, SequenceShard, attend
from lightning_longnet.attention.parallel import calls
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.parallel.rank_blocks import Layout, rank_blocks
from lightning_longnet.attention.parallel.schedule import Schedule
from lightning_longnet.attention.plan import blocks as plan

EXCHANGES = ["gather", "ring", "swap", "auto"]


def drawn_on(pool, world, exchange, data, dtype, tolerance):
    compare(pool, world, exchange, *data.draw(split_cases(world)), dtype, tolerance)


def on(*worlds, long):
    """Every exchange on every world, on these in the quick tests already."""
    return tiered(product(WORLDS, EXCHANGES), quick=product(worlds, EXCHANGES), long=long)


@pytest.mark.parametrize(("world", "exchange"), on(1, 2, 3, 5, long=[(4, "gather"), (8, "ring"), (8, "swap")]))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_brute_force_in_float64(pool, world, exchange, data):
    drawn_on(pool, world, exchange, data, torch.float64, 1e-10)


@pytest.mark.parametrize(("world", "exchange"), on(1, 3, long=[(5, "auto"), (8, "gather")]))
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_brute_force_in_float32(pool, world, exchange, data):
    drawn_on(pool, world, exchange, data, torch.float32, 1e-5)


@pytest.mark.full
@pytest.mark.parametrize(("world", "exchange"), list(product([2, 3, 5], EXCHANGES)))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_brute_force_over_many_cases(pool, world, exchange, data):
    drawn_on(pool, world, exchange, data, torch.float64, 1e-10)


ROUNDED = list(product([False, True], ["contiguous", "zigzag"], EXCHANGES))


def in_one_process(_, tensors, pattern, dtype):
    """Return out and the gradients of q, k and v, of inputs that are rounded to bfloat16."""
    leaves = [x.bfloat16().to(dtype).requires_grad_() for x in tensors[:3]]
    out = attend(*leaves, pattern)
    return out.detach(), *torch.autograd.grad(out, leaves, tensors[3].bfloat16().to(dtype))


@pytest.mark.parametrize(
    ("is_causal", "placement", "exchange"),
    tiered(ROUNDED, quick=[case for case in ROUNDED if case[:2] == (True, "zigzag")], covers=2),
)
def test_bfloat16_is_as_close_to_the_truth_as_one_process(pool, is_causal, placement, exchange):
    tensors = [x.detach() for x in drawn.tensors((1, 300, 4, 4, 16))]
    pattern = Pattern.dilated((16, 64, 256), (1, 2, 4), is_causal)
    where = Placement((170, 130), placement)
    options = {"pattern": pattern, "exchange": exchange}
    result = pool.run(2, step, tensors, where, None, None, options, torch.bfloat16)
    assert all(sent > 0 for *_, sent, _ in result) or (is_causal and placement == "contiguous")
    # in a process like those of the ranks: torch may have other kernels for bfloat16 in this one, after other tests
    results = [pool.run(1, in_one_process, tensors, pattern, dtype)[0] for dtype in (torch.float64, torch.bfloat16)]
    order = torch.cat([held(where, rank) for rank in range(2)])
    for i, (true, one) in enumerate(zip(*results, strict=True)):
        ours = torch.cat([(each[0], *each[2:5])[i] for each in result], 1).double()
        assert (ours - true[:, order]).norm() <= 1.5 * (one.double() - true).norm()


def test_local_sends_nothing_where_each_segment_is_on_one_rank(pool):
    pattern = Pattern.dilated((4, 12), (1, 3), is_causal=True)
    tensors = [x.detach() for x in drawn.tensors((2, 60, 4, 2, 8))]
    where = Placement((24, 0, 36), "contiguous")
    result = pool.run(3, step, tensors, where, None, None, {"pattern": pattern, "exchange": "local"}, torch.float64)
    assert all(each[5:] == (0, 0) for each in result)
    torch.testing.assert_close(side_by_side(result), whole(tensors, pattern, where), rtol=1e-10, atol=1e-10)


def alternating(group, tensors, placement, patterns, exchange):
    """Steps of one shard with one pattern and the other, and of both again; of each its out, lse and gradients."""
    at = held(placement, group.rank())
    q, k, v, grad = (x[:, at] for x in tensors)
    shard, result = SequenceShard(group, len(at)), []
    for pattern in (*patterns, *patterns):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = attend(*leaves, pattern, shard=shard, exchange=exchange, return_lse=True)
        out.backward(grad, retain_graph=True)
        once = [x.grad.clone() for x in leaves]
        out.backward(grad)
        assert all(torch.equal(x.grad, 2 * each) for x, each in zip(leaves, once, strict=True))
        result.append((out.detach(), lse.detach(), *once))
    return result


@pytest.mark.parametrize("exchange", tiered(["gather", "ring", "swap", "auto"], quick=["ring", "swap"]))
def test_a_shard_serves_layers_of_several_patterns_and_gradients_twice(pool, exchange):
    patterns = LONGNET, Pattern.dilated((16, 64, 256), (2, 1, 4), is_causal=True), Pattern.window(50)
    tensors = [x.detach() for x in drawn.tensors((1, 150, 6, 3, 8))]
    where = Placement((40, 77, 33), "contiguous")
    result = pool.run(3, alternating, tensors, where, patterns, exchange)
    for pattern, each in zip((*patterns, *patterns), zip(*result, strict=True), strict=True):
        torch.testing.assert_close(side_by_side(each), whole(tensors, pattern, where), rtol=1e-10, atol=1e-10)


def compiled(group):
    q, k, v, grad = (torch.randn(1, 40, 2, 4) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    shard = SequenceShard(group, 40)

    def call(q, k, v):
        return attend(2 * q, k, v, LONGNET, shard=shard) + v

    results = []
    for each in (call, torch.compile(call, backend="aot_eager")):
        out = each(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
    return results


@pytest.mark.long
def test_a_compiled_call_runs_the_exchange_outside_of_its_graph(pool):
    for plain, other in pool.run(2, compiled):
        torch.testing.assert_close(other, plain)


def mixed(group, tensors, placement, settings):
    with patch.object(calls, "schedule", lambda *_: Schedule(("gather", "ring", "ring"), "drawn")):
        return step(group, tensors, placement, None, None, settings, torch.float64)


@pytest.mark.parametrize(
    ("mix", "multiplicity", "placement"),
    tiered(
        product(["exact", "detached"], ["multiset", "set"], ["contiguous", "zigzag"]),
        quick=[("exact", "multiset", "zigzag"), ("detached", "set", "contiguous")],
    ),
)
def test_one_call_may_gather_some_branches_and_ring_others(pool, mix, multiplicity, placement):
    pattern = Pattern(LONGNET.branches, multiplicity)
    tensors = [x.detach() for x in drawn.tensors((2, 300, 4, 2, 8))]
    where = Placement((90, 50, 100, 60), placement)
    result = pool.run(4, mixed, tensors, where, {"pattern": pattern, "mix": mix})
    torch.testing.assert_close(side_by_side(result), whole(tensors, pattern, where, mix=mix), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_pairs_of_a_branch_are_removed_after_they_are_added(pool, exchange):
    """With "detached" each branch has its own sum, in which nothing else stands for pairs that are not there yet."""
    pattern = Pattern((Branch(8, 2), Branch(16, 1), Branch(32, 2)), "set")
    tensors, where = [x.detach() for x in drawn.tensors((1, 29, 2, 2, 8))], Placement((5, 6, 6, 6, 6), "zigzag")
    settings = {"pattern": pattern, "mix": "detached", "exchange": exchange}
    result = pool.run(5, step, tensors, where, None, None, settings, torch.float64)
    torch.testing.assert_close(
        side_by_side(result), whole(tensors, pattern, where, mix="detached"), rtol=1e-10, atol=1e-10
    )


def weighted(group, tensors, placement, settings):
    """A pair that branches share is computed once, with its weight, however little that saves."""
    with drawn.planned(counts_once=True, tile=8), patch.object(plan, "NARROW_SHARE", 1.0):
        rank_blocks.cache_clear()
        result = step(group, tensors, placement, None, None, settings, torch.float64)
        layout = Layout(settings["pattern"], 4, 2, (0, placement.length), placement, 1)
        assert plan.plan(layout.pattern, 4, 2, layout.cuts, 1).counts_once
    rank_blocks.cache_clear()
    return result


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("is_causal", tiered([False, True], quick=[True]))
def test_pairs_that_branches_share_are_weighed_over_ranks(pool, exchange, is_causal):
    pattern = Pattern.dilated((8, 32, 96), (1, 2, 4), is_causal)
    tensors = [x.detach() for x in drawn.tensors((2, 96, 4, 2, 8))]
    world, lengths = (2, (37, 59)) if exchange == "swap" else (4, (5, 22, 40, 29))
    where = Placement(lengths, "zigzag" if is_causal else "contiguous")
    result = pool.run(world, weighted, tensors, where, {"pattern": pattern, "exchange": exchange})
    truth = whole(tensors, pattern, where, kernel="reference")
    torch.testing.assert_close(side_by_side(result), truth, rtol=1e-10, atol=1e-10)


class Undefined(torch.autograd.Function):
    """A sum whose gradient is undefined."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return None


def with_an_undefined_gradient(group):
    """The gradients of a rank where that of out is undefined on rank 1, and of a next call."""
    shard, result = SequenceShard(group, 16), []
    for _ in range(2):
        q, k, v = (torch.ones(1, 16, 2, 4, requires_grad=True) for _ in range(3))
        out = attend(q, k, v, LONGNET, shard=shard, exchange="ring")
        loss = Undefined.apply(out) if group.rank() else out.sum()
        loss.backward()
        result.append([float(x.grad.sum()) for x in (q, k, v)])
    return result


def test_an_undefined_gradient_is_zero_and_other_ranks_get_their_part(pool):
    q, k, v = (torch.ones(1, 32, 2, 4, requires_grad=True) for _ in range(3))
    attend(q, k, v, LONGNET)[:, :16].sum().backward()
    for rank, result in enumerate(pool.run(2, with_an_undefined_gradient)):
        rows = slice(16 * rank, 16 * rank + 16)
        assert result == [[pytest.approx(float(x.grad[:, rows].sum()), abs=1e-5) for x in (q, k, v)]] * 2
    one = torch.ones(1, 16, 2, 4, requires_grad=True)
    Undefined.apply(attend(one, one, one, LONGNET)).backward()
    assert (one.grad == 0).all()


def saved(group, exchange, ordering):
    """MiB that the graph of a call holds of tensors like q, without the rows of q, k, v and out of this rank."""
    shard = SequenceShard(group, 256)
    leaves = [torch.randn(1, 256, 4, 16, requires_grad=True) for _ in range(3)]
    own, kept = [x * 1.0 for x in leaves], {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) and x, lambda x: x
    ):
        attend(*own, Pattern.dilated((64,), (1,)), shard=shard, exchange=exchange, ordering=ordering)
    return sum(kept.values()) / own[0].untyped_storage().nbytes()


def test_a_call_that_keeps_its_inputs_saves_no_others(pool):
    """Beside lse, an all_to_all keeps q, k, v and out of its heads, an order those of its rows; each saves out."""
    for exchange, ordering in (("swap", "raster"), ("gather", "hilbert")):
        assert max(pool.run(2, saved, exchange, ordering)) < 5.5
