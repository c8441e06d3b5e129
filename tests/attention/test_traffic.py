"""What attention over ranks sends, in which order, and what it holds in memory meanwhile."""

import re
from collections import Counter
from contextlib import ExitStack
from functools import partial
from inspect import isfunction, signature
from unittest.mock import patch

import drawn
import pytest
import torch
import torch.distributed as dist
from memory import peak_bytes
from split import LONGNET, step
from tiers import tiered
from torch.distributed import distributed_c10d
from torch.utils.checkpoint import checkpoint

from lightning_longnet import Pattern, SequenceShard, attend, keep_attention, sequence_plan
from lightning_longnet.attention.kernels.sdpa import cpu
from lightning_longnet.attention.parallel import calls
from lightning_longnet.attention.parallel.comm import Pending
from lightning_longnet.attention.parallel.exchange import Sizes
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.parallel.rank_blocks import Layout
from lightning_longnet.attention.parallel.schedule import exchange_plan, schedule


@pytest.mark.parametrize("exchange", ["gather", "ring", "swap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sends_what_the_schedule_says(pool, exchange, dtype):
    tensors = [x.detach() for x in drawn.tensors((2, 300, 8, 4, 16))]
    where = Placement((90, 50, 100, 60), "contiguous")
    result = pool.run(4, step, tensors, where, None, None, {"pattern": LONGNET, "exchange": exchange}, dtype)
    layout = Layout(LONGNET, 8, 4, (0, 300), where)
    sizes = Sizes(2, 16, 16, dtype.itemsize, 4)
    for rank, (*_, sent, messages) in enumerate(result):
        volume = exchange_plan(layout, (exchange,) * 3).volume(rank, sizes)
        # a shard's own words at its beginning, and lse, which this test asks for, are not the exchange's
        lse = 2 * 8 // 4 * (300 - where.lengths[rank]) * 4 if exchange == "swap" else 0
        assert sent - lse == volume.sent_bytes > 0
        assert messages == volume.messages + (3 if exchange == "swap" else 0)


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


@pytest.mark.parametrize("is_causal", tiered([False, True], quick=[], full=[False]))
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


@pytest.mark.long
def test_a_dilated_ring_needs_as_much_memory_on_any_number_of_ranks(pool):
    """Within a tenth, though the longest segment spans all eight."""
    pattern = Pattern.dilated((1024, 4096, 16384), (1, 4, 16), is_causal=True)
    peaks = {world: max(pool.run(world, peak, "ring", 2048, pattern)) for world in (2, 3, 5, 8)}
    assert max(peaks.values()) <= 1.1 * min(peaks.values()), peaks
    few, many = (max(pool.run(world, peak, "gather", 2048, Pattern.dense(is_causal=True))) for world in (2, 8))
    assert many > 1.5 * few  # what keeps all keys would not pass


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

    def recorded(name, function):
        return lambda *a, **s: (done.append(name), function(*a, **s))[1]

    with (
        patch.object(shard.comm, "exchange", recorded("start", shard.comm.exchange)),
        patch.object(Pending, "wait", lambda self, wait=Pending.wait: (done.append("wait"), wait(self))[1]),
        patch.object(cpu, "_forward", recorded("forward", cpu._forward)),
        patch.object(cpu, "_backward", recorded("backward", cpu._backward)),
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


def planned(group):
    """(threads, what the exchange of two calls was chosen from), each rank with more threads than the one before."""
    asked = []
    torch.set_num_threads(1 + group.rank())
    try:
        shard = SequenceShard(group, 64)
        with patch.object(calls, "schedule", lambda *arguments: (asked.append(arguments), schedule(*arguments))[1]):
            q = torch.zeros(1, 64, 4, 16)
            for _ in range(2):
                attend(q, q, q, LONGNET, shard=shard)
    finally:
        torch.set_num_threads(1)
    return shard.threads, asked


def test_a_call_does_what_the_plan_says(pool):
    """Once for all calls of a shard; weights, which go by the threads of all ranks, have no part in it."""
    whole_plan = sequence_plan(LONGNET, (64,) * 3, 4, head_dim=16)
    for threads, asked in pool.run(3, planned):
        assert threads == 3
        assert asked == [(whole_plan.layout, "auto", Sizes(1, 16, 16, 4, 4))]
