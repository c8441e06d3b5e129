"""Attention over ranks against the brute force: every exchange and placement, on 1 to 8 processes."""

import re
from collections import Counter
from contextlib import ExitStack
from functools import partial
from inspect import isfunction, signature
from unittest.mock import patch

import brute
import drawn
import pytest
import torch
import torch.distributed as dist
from cells import held
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory import peak_bytes
from pool import WORLDS
from torch.distributed import distributed_c10d
from torch.utils.checkpoint import checkpoint

from lightning_longnet import Pattern, SequenceShard, attend, keep_attention, sequence_plan
from lightning_longnet.attention import plan, sharded
from lightning_longnet.attention.exchange.comm import Pending
from lightning_longnet.attention.kernels.sdpa import cpu
from lightning_longnet.attention.placement import Placement
from lightning_longnet.attention.routes import Layout, crossings
from lightning_longnet.attention.schedule import Schedule, Sizes, schedule, volume

EXCHANGES = ["gather", "ring", "swap", "auto"]


def step(group, tensors, placement, ids, hidden, settings, dtype):
    """One rank's forward and backward: (out, lse, dq, dk, dv, bytes sent, messages)."""
    at = held(placement, group.rank())
    q, k, v, grad = (x[:, at].to(dtype) for x in tensors)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    shard = SequenceShard(
        group,
        len(at),
        placement.kind,
        None if ids is None else ids[..., at],
        None if hidden is None else hidden[:, at],
    )
    out, lse = attend(*leaves, shard=shard, return_lse=True, **settings)
    found = torch.autograd.grad(out, leaves, grad)
    return *(x.detach() for x in (out, lse, *found)), shard.comm.sent_bytes, shard.comm.messages


@st.composite
def split_cases(draw, world):
    case = draw(drawn.cases())
    length = case["shape"][1]
    borders = sorted(draw(st.lists(st.integers(0, length), min_size=world - 1, max_size=world - 1)))
    lengths = tuple(b - a for a, b in zip([0, *borders], [*borders, length], strict=True))
    return case, Placement(lengths, draw(st.sampled_from(["contiguous", "zigzag"])))


def compare(pool, world, exchange, case, placement, dtype=torch.float64, tolerance=1e-10):
    batch, length, heads, kv_heads, dim = case["shape"]
    if exchange == "swap":
        heads, kv_heads = heads * world, kv_heads * world
    tensors = [
        x.detach() for x in drawn.tensors((batch, length, heads, kv_heads, dim), "contiguous", seed=case["seed"])
    ]
    ids, hidden = case["ids"], case["hidden"]
    rows = ids if ids and isinstance(ids[0], list) else [ids] * batch
    tables = [brute.counts(case["shown"], case["multiplicity"], length, kv_heads, row) for row in rows]
    moves = exchange == "swap" or any(
        table[:, held(placement, a)][:, :, held(placement, b)].any()
        for row in tables
        for table in row
        for a in range(world)
        for b in range(world)
        if a != b
    )
    if hidden is not None:
        tables = [brute.padded(table, row) for table, row in zip(tables, hidden, strict=True)]
    kept = None
    if case["dropout"]:
        count = len(case["shown"])
        kept = brute.kept(case["dropout"], case["seed"], batch, heads, length, count, case["multiplicity"])
    settings = {
        "pattern": drawn.pattern_of(case["shown"], case["multiplicity"]),
        "scale": 0.7 / dim**0.5,
        "mix": case["mix"],
        "exchange": exchange,
        "dropout": case["dropout"],
        "dropout_seed": case["seed"],
    }
    found = pool.run(
        world,
        step,
        tensors,
        placement,
        None if ids is None else torch.tensor(ids),
        None if hidden is None else torch.tensor(hidden),
        settings,
        dtype,
    )
    wide = [x.to(dtype).double().requires_grad_() for x in tensors[:3]]
    out, lse = brute.attention(*wide, tables, settings["scale"], case["mix"], kept)
    truth = (out, *torch.autograd.grad(out, wide, tensors[3].to(dtype).double()))
    empty = lse == -torch.inf
    for rank, (own_out, own_lse, *grads, _, _) in enumerate(found):
        at = held(placement, rank)
        assert torch.equal(own_lse == -torch.inf, empty[..., at])
        assert (own_out.transpose(1, 2)[empty[..., at]] == 0).all()
        pairs = zip(
            (own_out, *grads, own_lse.masked_fill(empty[..., at], 0)),
            (*(x[:, at] for x in truth), lse.masked_fill(empty, 0)[..., at]),
            strict=True,
        )
        for ours, true in pairs:
            assert ours.shape == true.shape
            if ours.numel():
                assert (ours.double() - true).abs().max() <= tolerance * max(1, true.abs().max())
    if dtype == torch.float64 and world > 1:
        assert (sum(sent for *_, sent, _ in found) > 0) == bool(moves)
    return found


def drawn_on(pool, world, exchange, data, dtype, tolerance):
    compare(pool, world, exchange, *data.draw(split_cases(world)), dtype, tolerance)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("world", WORLDS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_brute_force_in_float64(pool, world, exchange, data):
    drawn_on(pool, world, exchange, data, torch.float64, 1e-10)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("world", WORLDS)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_brute_force_in_float32(pool, world, exchange, data):
    drawn_on(pool, world, exchange, data, torch.float32, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("world", [2, 3, 5])
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_brute_force_over_many_cases(pool, world, exchange, data):
    drawn_on(pool, world, exchange, data, torch.float64, 1e-10)


LONGNET = Pattern.dilated((16, 64, 256), (1, 2, 4), is_causal=True)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("placement", ["contiguous", "zigzag"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_bfloat16_is_as_close_to_the_truth_as_one_process(pool, exchange, placement, is_causal):
    tensors = [x.detach() for x in drawn.tensors((1, 300, 4, 4, 16))]
    pattern = Pattern.dilated((16, 64, 256), (1, 2, 4), is_causal)
    where = Placement((170, 130), placement)
    told = {"pattern": pattern, "exchange": exchange}
    found = pool.run(2, step, tensors, where, None, None, told, torch.bfloat16)
    assert all(sent > 0 for *_, sent, _ in found) or (is_causal and placement == "contiguous")
    wide = [x.bfloat16().double().requires_grad_() for x in tensors[:3]]
    half = [x.bfloat16().requires_grad_() for x in tensors[:3]]
    results = []
    for leaves in (wide, half):
        out = attend(*leaves, pattern)
        results.append((out, *torch.autograd.grad(out, leaves, tensors[3].bfloat16().to(out.dtype))))
    order = torch.cat([held(where, rank) for rank in range(2)])
    for i, (true, one) in enumerate(zip(*results, strict=True)):
        ours = torch.cat([(each[0], *each[2:5])[i] for each in found], 1).double()
        assert (ours - true[:, order]).norm() <= 1.5 * (one.double() - true).norm()


@pytest.mark.parametrize("exchange", ["gather", "ring", "swap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sends_what_the_schedule_says(pool, exchange, dtype):
    tensors = [x.detach() for x in drawn.tensors((2, 300, 8, 4, 16))]
    where = Placement((90, 50, 100, 60), "contiguous")
    found = pool.run(4, step, tensors, where, None, None, {"pattern": LONGNET, "exchange": exchange}, dtype)
    layout = Layout(LONGNET, 8, 4, (0, 300), where)
    sizes = Sizes(2, 16, 16, dtype.itemsize, 4)
    for rank, (*_, sent, messages) in enumerate(found):
        told = volume(layout, (exchange,) * 3, rank, sizes)
        # a shard's own words at its beginning, and lse, which this test asks for, are not the exchange's
        lse = 2 * 8 // 4 * (300 - where.lengths[rank]) * 4 if exchange == "swap" else 0
        assert sent - lse == told.sent_bytes > 0
        assert messages == told.messages + (3 if exchange == "swap" else 0)


def whole(tensors, pattern, placement, **settings):
    """What one process gives, in the order in which ranks hold tokens: out, dq, dk, dv."""
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    out = attend(*leaves, pattern, **settings)
    order = torch.cat([held(placement, rank) for rank in range(placement.ranks)])
    return [x[:, order] for x in (out, *torch.autograd.grad(out, leaves, tensors[3]))]


def side_by_side(found):
    """The same, of what each rank gave."""
    return [torch.cat([(each[0], *each[2:5])[i] for each in found], 1) for i in range(4)]


def test_local_sends_nothing_where_each_segment_is_on_one_rank(pool):
    pattern = Pattern.dilated((4, 12), (1, 3), is_causal=True)
    tensors = [x.detach() for x in drawn.tensors((2, 60, 4, 2, 8))]
    where = Placement((24, 0, 36), "contiguous")
    found = pool.run(3, step, tensors, where, None, None, {"pattern": pattern, "exchange": "local"}, torch.float64)
    assert all(each[5:] == (0, 0) for each in found)
    torch.testing.assert_close(side_by_side(found), whole(tensors, pattern, where), rtol=1e-10, atol=1e-10)


def alternating(group, tensors, placement, patterns, exchange):
    """Steps of one shard with one pattern and the other, and of both again; of each its out, lse and gradients."""
    at = held(placement, group.rank())
    q, k, v, grad = (x[:, at] for x in tensors)
    shard, found = SequenceShard(group, len(at)), []
    for pattern in (*patterns, *patterns):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = attend(*leaves, pattern, shard=shard, exchange=exchange, return_lse=True)
        out.backward(grad, retain_graph=True)
        once = [x.grad.clone() for x in leaves]
        out.backward(grad)
        assert all(torch.equal(x.grad, 2 * each) for x, each in zip(leaves, once, strict=True))
        found.append((out.detach(), lse.detach(), *once))
    return found


@pytest.mark.parametrize("exchange", ["gather", "ring", "swap", "auto"])
def test_a_shard_serves_layers_of_several_patterns_and_gradients_twice(pool, exchange):
    patterns = LONGNET, Pattern.dilated((16, 64, 256), (2, 1, 4), is_causal=True), Pattern.window(50)
    tensors = [x.detach() for x in drawn.tensors((1, 150, 6, 3, 8))]
    where = Placement((40, 77, 33), "contiguous")
    found = pool.run(3, alternating, tensors, where, patterns, exchange)
    for pattern, each in zip((*patterns, *patterns), zip(*found, strict=True), strict=True):
        torch.testing.assert_close(side_by_side(each), whole(tensors, pattern, where), rtol=1e-10, atol=1e-10)


def collectives(group, exchange):
    """How often each function of torch.distributed is called in a step of a known kind."""
    shard, calls = SequenceShard(group, 32), Counter()
    tensors = [x.requires_grad_() for x in torch.randn(3, 1, 32, 4, 8)]
    attend(*tensors, Pattern.dense(), shard=shard, exchange=exchange)
    names = [
        name
        for name in distributed_c10d.__all__
        if isfunction(real := getattr(distributed_c10d, name)) and "async_op" in signature(real).parameters
    ]
    assert {"barrier", "all_reduce", "all_gather", "all_to_all_single"} <= {*names}
    with ExitStack() as patches:
        for name in (*names, "send", "recv", "batch_isend_irecv"):
            patches.enter_context(patch.object(dist, name, partial(counted, calls, name, getattr(dist, name))))
        attend(*tensors, Pattern.dense(), shard=shard, exchange=exchange).sum().backward()
    return dict(calls)


def counted(calls, name, real, *arguments, **settings):
    calls[name] += 1
    return real(*arguments, **settings)


@pytest.mark.parametrize(("exchange", "batches"), [("gather", 2), ("ring", 9), ("swap", 4)])
def test_a_step_is_messages_and_no_barrier(pool, exchange, batches):
    """Gather: keys, and their gradients.  Ring on four: three rounds, and in the backward three of each.  Swap: there
    and back, twice.
    """
    assert pool.run(4, collectives, exchange) == [{"batch_isend_irecv": batches}] * 4


def peak(group, exchange, tokens, pattern, is_forward=False):
    """The most that a rank's allocator held at once, beyond its inputs, of a step over all ranks."""
    shape = 1, tokens, 4, 32
    q, k, v, grad = (torch.randn(shape) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    shard = SequenceShard(group, tokens)

    def step():
        for x in leaves:
            x.grad = None
        with torch.set_grad_enabled(not is_forward):
            out = attend(*leaves, pattern, shard=shard, exchange=exchange)
        if not is_forward:
            out.backward(grad)

    step()  # once for what is kept from call to call
    for x in leaves:
        x.grad = None
    return peak_bytes(step)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_ring_needs_no_more_memory_on_more_ranks(pool, is_causal):
    """Beside one chunk on its way: another of keys, the copy that is sent, and two of gradients, whatever the world."""
    pattern = Pattern.dense(is_causal)
    peaks = {world: max(pool.run(world, peak, "ring", 512, pattern)) for world in (2, 3, 5, 8)}
    chunk = 2 * 512 * 4 * 32 * 4
    assert all(peaks[world] <= 1.02 * (peaks[2] + 4 * chunk) for world in (3, 5, 8))
    if not is_causal:
        assert peaks[8] <= 1.02 * peaks[5]
    gathered = max(pool.run(8, peak, "gather", 512, pattern))
    assert gathered > peaks[8] + 5 * chunk
    forward = {world: max(pool.run(world, peak, "ring", 512, pattern, True)) for world in (2, 5, 8)}
    assert forward[8] <= 1.02 * forward[5]
    assert forward[5] <= 1.02 * (forward[2] + 2 * chunk)  # a second chunk, and the copy that is sent


def test_a_dilated_ring_needs_as_much_memory_on_any_number_of_ranks(pool):
    """Within a tenth, though the longest segment spans all eight."""
    pattern = Pattern.dilated((512, 2048, 8192), (1, 4, 16), is_causal=True)
    peaks = {world: max(pool.run(world, peak, "ring", 1024, pattern)) for world in (2, 3, 5, 8)}
    assert max(peaks.values()) <= 1.1 * min(peaks.values()), peaks
    few, many = (max(pool.run(world, peak, "gather", 1024, pattern)) for world in (2, 8))
    assert many > 1.1 * few  # what keeps all keys would not pass


def checkpointed(group, way):
    """(results, messages) of a step whose attention stands under a checkpoint."""
    generator = torch.Generator().manual_seed(group.rank())
    q, k, v, grad = (torch.randn(1, 128, 4, 8, generator=generator) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    shard = SequenceShard(group, 128)

    def call(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return attend(q, k, v, LONGNET, shard=shard, exchange="gather", dropout=0.2).float()

    torch.manual_seed(5)
    if way == "plain":
        out = call(*leaves)
    else:
        context = {"context_fn": keep_attention} if way == "kept" else {}
        out = checkpoint(call, *leaves, use_reentrant=False, **context)
    torch.manual_seed(9)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)], shard.comm.messages


def test_a_checkpoint_that_keeps_attention_sends_nothing_twice(pool):
    plain, again, kept = (pool.run(2, checkpointed, way) for way in ("plain", "again", "kept"))
    for rank in range(2):
        for other in (again, kept):
            assert all(torch.equal(a, b) for a, b in zip(other[rank][0], plain[rank][0], strict=True))
    # rank 0 sends keys forward, rank 1 their gradients back
    assert [messages for _, messages in plain] == [1, 1]
    assert [messages for _, messages in again] == [2, 1]
    assert [messages for _, messages in kept] == [1, 1]


def order(group, exchange):
    """What a rank does, one after the other."""
    shard, done = SequenceShard(group, 256), []
    q, k, v = (torch.randn(1, 256, 2, 8, requires_grad=True) for _ in range(3))

    def told(name, function):
        return lambda *a, **s: (done.append(name), function(*a, **s))[1]

    with (
        patch.object(shard.comm, "swap", told("start", shard.comm.swap)),
        patch.object(Pending, "wait", lambda self, wait=Pending.wait: (done.append("wait"), wait(self))[1]),
        patch.object(cpu, "_forward", told("forward", cpu._forward)),
        patch.object(cpu, "_backward", told("backward", cpu._backward)),
    ):
        out = attend(q, k, v, Pattern.dense(), shard=shard, exchange=exchange, kernel="sdpa")
        done.append("|")
        out.sum().backward()
    return "".join(word[0] for word in done)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_an_exchange_is_on_its_way_while_own_blocks_are_computed(pool, exchange):
    for done in pool.run(3, order, exchange):
        forward, backward = done.split("|")
        assert re.match(r"sf+w", forward), done
        if exchange == "gather":  # gradients of what was kept go home while own ones are computed
            assert re.search(r"b+s+b+w", backward), done
        else:
            assert re.match(r"sb+ws", backward), done  # the next round is fetched before this one is computed
            assert forward.count("w") == 2


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
    with patch.object(sharded, "schedule", lambda *_: Schedule(("gather", "ring", "ring"), "drawn")):
        return step(group, tensors, placement, None, None, settings, torch.float64)


@pytest.mark.parametrize("placement", ["contiguous", "zigzag"])
@pytest.mark.parametrize("multiplicity", ["multiset", "set"])
@pytest.mark.parametrize("mix", ["exact", "detached"])
def test_one_call_may_gather_some_branches_and_ring_others(pool, placement, multiplicity, mix):
    pattern = Pattern(LONGNET.branches, multiplicity)
    tensors = [x.detach() for x in drawn.tensors((2, 300, 4, 2, 8))]
    where = Placement((90, 50, 100, 60), placement)
    found = pool.run(4, mixed, tensors, where, {"pattern": pattern, "mix": mix})
    torch.testing.assert_close(side_by_side(found), whole(tensors, pattern, where, mix=mix), rtol=1e-10, atol=1e-10)


def weighted(group, tensors, placement, settings):
    """A pair that branches share is computed once, with its weight, however little that saves."""
    with drawn.planned(distinct=True, tile=8), patch.object(plan, "NARROW_SHARE", 1.0):
        crossings.cache_clear()
        found = step(group, tensors, placement, None, None, settings, torch.float64)
        layout = Layout(settings["pattern"], 4, 2, (0, placement.length), placement, 1)
        assert plan.plan(layout.pattern, 4, 2, layout.cuts, 1).counts_once
    crossings.cache_clear()
    return found


@pytest.mark.parametrize("exchange", ["gather", "ring", "swap", "auto"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_pairs_that_branches_share_are_weighed_over_ranks(pool, exchange, is_causal):
    pattern = Pattern.dilated((8, 32, 96), (1, 2, 4), is_causal)
    tensors = [x.detach() for x in drawn.tensors((2, 96, 4, 2, 8))]
    world, lengths = (2, (37, 59)) if exchange == "swap" else (4, (5, 22, 40, 29))
    where = Placement(lengths, "zigzag" if is_causal else "contiguous")
    found = pool.run(world, weighted, tensors, where, {"pattern": pattern, "exchange": exchange})
    truth = whole(tensors, pattern, where, kernel="reference")
    torch.testing.assert_close(side_by_side(found), truth, rtol=1e-10, atol=1e-10)


def planned(group):
    """(threads, what the exchange of two calls was chosen from), each rank with more threads than the one before."""
    asked = []
    torch.set_num_threads(1 + group.rank())
    try:
        shard = SequenceShard(group, 64)
        with patch.object(sharded, "schedule", lambda *told: (asked.append(told), schedule(*told))[1]):
            q = torch.zeros(1, 64, 4, 16)
            for _ in range(2):
                attend(q, q, q, LONGNET, shard=shard)
    finally:
        torch.set_num_threads(1)
    return shard.threads, asked


def test_a_call_does_what_the_plan_told(pool):
    """Once for all calls of a shard; weights, which go by the threads of all ranks, have no part in it."""
    told = sequence_plan(LONGNET, (64,) * 3, 4, head_dim=16)
    for threads, asked in pool.run(3, planned):
        assert threads == 3
        assert asked == [(told.layout, "auto", Sizes(1, 16, 16, 4, 4))]
