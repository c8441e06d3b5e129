"""What goes wrong after a good beginning is told within the timeout of the group, and never gives a wrong number."""

import gc
import os
import time
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from contexts import made
from pool import Pool
from tiers import tiered

from lightning_longnet import Pattern, SequenceShard, attend
from lightning_longnet.attention import op, prepared
from lightning_longnet.attention.kernels import eager
from lightning_longnet.attention.parallel import rounds_plan

DENSE = Pattern.dense()


def drawn(length=16, heads=4, dim=4, batch=1, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = batch, length, heads, dim
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


@pytest.fixture(scope="module")
def spent():
    """Workers of this file alone: gloo's threads never rest again once a peer has given up on a connection."""
    result = Pool(8)
    yield result
    result.close(kill=True)


def pairs(group, function, cases):
    """Ranks 2 i and 2 i + 1 do case i in a group of their own, which an error may leave unusable."""
    made = [dist.new_group([2 * i, 2 * i + 1], timeout=timedelta(seconds=3)) for i in range(len(cases))]
    begin = time.perf_counter()
    result = function(made[group.rank() // 2], *cases[group.rank() // 2])
    return result, time.perf_counter() - begin


def outcome_of(function, *arguments):
    """What went wrong, or nothing."""
    try:
        function(*arguments)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def step(shard, tensors, settings):
    attend(*tensors, **{"pattern": DENSE, "exchange": "gather", "shard": shard, **settings}).float().sum().backward()


OTHERS = {
    "pattern": ({}, {"pattern": Pattern.window(3)}),
    "wide type": ({"dtype": torch.float64}, {}),
    "batch": ({"batch": 2}, {}),
    "exchange": ({}, {"exchange": "swap"}),
    "scale": ({}, {"scale": 3.0}),
    "tokens": ({"length": 15}, {}),
}


def later(group, name, is_known):
    """After good calls, rank 1 does something else: of a kind that is new to the shard, or known to it."""
    shard, (tensors, settings) = SequenceShard(group, 16), OTHERS[name]
    step(shard, drawn(), {})
    if is_known:
        step(shard, drawn(**tensors), settings)
    if group.rank():
        return outcome_of(step, shard, drawn(**tensors), settings)
    return outcome_of(step, shard, drawn(), {})


def check_later(first, second, seconds, name):
    assert first.startswith("RuntimeError: rank 0 of 2, forward of call 1, samples 0 to 0, keys and values"), first
    wrong = "ValueError: q must have" if name == "tokens" else "RuntimeError: rank 1 of 2, compares a call"
    assert second.startswith(wrong), second
    assert seconds < 10


@pytest.mark.long
def test_a_later_call_that_differs_ends_at_the_timeout(spent):
    names = ["pattern", "wide type", "batch", "tokens"]
    result = spent.run(8, pairs, later, [(name, False) for name in names])
    for (first, seconds), (second, _), name in zip(result[::2], result[1::2], names, strict=True):
        check_later(first, second, seconds, name)


@pytest.mark.long
def test_kinds_of_calls_never_match_each_other(spent):
    names = ["pattern", "batch", "exchange", "scale"]
    for result, _ in spent.run(8, pairs, later, [(name, True) for name in names]):
        assert "of 2, forward of call 2, samples 0 to" in result, result


PLACES = {
    "a kernel's forward": (eager, "forward", 2),
    "a kernel's backward": (eager, "backward", 2),
    "copies": (op, "as_readable", 1),
    "copies of a backward": (op, "as_readable", 4),
    "a plan": (rounds_plan, "route", 1),
    "arguments": (prepared, "request_of", 1),
}


def failing(group, place, exchange):
    """Something fails on rank 1 in the first step; the error is caught, and the next batches are done."""
    where, name, at = PLACES[place]
    shard, real = SequenceShard(group, 16), getattr(where, name)
    calls, result = [], []
    if place == "arguments":  # of a call whose kind is known: of a first one the others would be told
        step(shard, drawn(), {"kernel": "eager", "exchange": exchange})

    def broken(*arguments, **settings):
        calls.append(name)
        if group.rank() and len(calls) == at:
            raise torch.OutOfMemoryError("injected")
        return real(*arguments, **settings)

    with patch.object(where, name, broken):
        for seed in range(3):
            result.append(outcome_of(step, shard, drawn(seed=seed), {"kernel": "eager", "exchange": exchange}))
    return result


KERNELS_FAIL = tuple((place, exchange) for place in list(PLACES)[:2] for exchange in ("ring", "gather"))
OTHERS_FAIL = (("copies", "gather"), ("copies of a backward", "ring"), ("a plan", "gather"), ("arguments", "gather"))


def check_failing(peer, failed, place):
    assert failed[0] == "OutOfMemoryError: injected"
    for each in failed[1:]:
        if place == "arguments":  # nothing of the call was begun: the next one waits for those who are behind
            assert each.startswith("RuntimeError: rank 1 of 2"), each
            continue
        where = "backward" if "backward" in place else "forward"
        assert each.startswith(f"RuntimeError: rank 1 of 2 failed in {where} of call 0 (OutOfMemoryError('injected'))")
        assert each.endswith("make a new group and a new shard")
    assert all(each.startswith("RuntimeError: rank 0 of 2") for each in peer[1:]), peer


@pytest.mark.long
@pytest.mark.parametrize("cases", [KERNELS_FAIL, OTHERS_FAIL], ids=["kernels", "others"])
def test_an_error_that_one_rank_catches_corrupts_nothing(spent, cases):
    result = spent.run(8, pairs, failing, list(cases))
    for (peer, _), (failed, _), (place, _) in zip(result[::2], result[1::2], cases, strict=True):
        check_failing(peer, failed, place)


def receiving(group):
    """A kernel fails on the rank that only receives, with the error of a refusal; what it does then."""
    shard, result = SequenceShard(group, 16), []
    q, k, v = (x.detach() for x in drawn())
    broken = {"side_effect": ValueError("injected")} if group.rank() else {"wraps": eager.forward}
    with patch.object(eager, "forward", **broken):
        for _ in range(2):
            result.append(outcome_of(lambda: attend(q, k, v, Pattern.dense(True), shard=shard, kernel="eager")))
    return result


@pytest.mark.long
def test_a_refusal_once_messages_are_on_their_way_is_a_failure(spent):
    for (refused, later), _ in spent.run(8, pairs, receiving, [()] * 4)[1::2]:
        assert refused == "ValueError: injected"
        assert later.startswith("RuntimeError: rank 1 of 2 failed in forward of call 0 (ValueError('injected'))")


def refusing(group):
    """Of calls of one kind rank 1 is given a wrong one, whose error it catches."""
    shard, result = SequenceShard(group, 16), []
    for i in range(4):
        wrong = {"dtype": torch.int64} if group.rank() and i == 1 else {}
        q, k, v = (x.detach().to(**wrong) for x in drawn(seed=i))
        result.append(outcome_of(lambda: attend(q, k, v, DENSE, shard=shard, exchange="gather")))  # noqa: B023  called here
    return result


def giving_up(group, is_context):
    """Batches of two calls; of the second batch rank 1 does one, and goes on with the next."""
    context = made(group)
    shard, result = None if is_context else SequenceShard(group, 16), []
    for batch in range(3):
        if is_context:
            context.split({"input_ids": torch.zeros(1, 32, dtype=torch.long)})
        else:
            shard.begin_batch(batch)
        for layer in range(2):
            if group.rank() and (batch, layer) == (1, 1):
                break
            q, k, v = (x.detach() for x in drawn(seed=2 * batch + layer))
            call = context.attend if is_context else attend
            settings = {"exchange": "gather"} | ({} if is_context else {"shard": shard})
            result.append(outcome_of(lambda: call(q, k, v, DENSE, **settings)))  # noqa: B023  called here
    return result


def doing(group, function, *arguments):
    return function(group, *arguments)


def check_apart(first, second):
    assert "" in first
    assert "" in second
    for own in (first, second):
        failed = [bool(each) for each in own]
        assert failed == sorted(failed), own  # once ranks are apart nothing succeeds
        assert failed[-1]


@pytest.mark.long
def test_a_rank_that_gives_up_a_call_or_a_batch_meets_nobody_in_the_next(spent):
    cases = [(refusing,), (giving_up, False), (giving_up, True)]
    result = spent.run(8, pairs, doing, [*cases, (refusing,)])
    for (first, _), (second, _) in zip(result[::2], result[1::2], strict=True):
        check_apart(first, second)


def disordered(group, way, exchange):
    """Gradients of two calls, whose backward passes each rank does in an order of its own."""
    shards = [SequenceShard(group, 16)] * 2 if way == "one shard" else [SequenceShard(group, 16) for _ in range(2)]
    outs = [attend(*drawn(seed=i), DENSE, shard=shard, exchange=exchange) for i, shard in enumerate(shards)]
    order = outs if group.rank() == 0 else outs[::-1]
    return outcome_of(lambda: [out.sum().backward() for out in order])


@pytest.mark.long
def test_backward_passes_in_another_order_are_an_error(spent):
    cases = [("one shard", "gather"), ("one shard", "ring"), ("one shard", "swap"), ("two shards", "ring")]
    for result, _ in spent.run(8, pairs, disordered, cases):
        assert "of 2, backward of call" in result, result


def test_a_fault_of_each_kind_is_reported(spent):
    """One case of each of the tests above, whose groups wait for their timeouts at the same time."""
    cases = [
        (later, "pattern", False),
        (failing, "a kernel's forward", "ring"),
        (giving_up, True),
        (disordered, "one shard", "ring"),
    ]
    result = spent.run(8, pairs, doing, cases)
    (first, seconds), (second, _) = result[:2]
    check_later(first, second, seconds, "pattern")
    check_failing(result[2][0], result[3][0], "a kernel's forward")
    check_apart(result[4][0], result[5][0])
    assert all("of 2, backward of call" in message for message, _ in result[6:]), result[6:]


def forgotten(group):
    """Nobody but the graph holds the shard."""
    tensors = drawn()
    shard = SequenceShard(group, 16)
    out = attend(*tensors, DENSE, shard=shard)
    del shard
    gc.collect()
    out.sum().backward()
    return all(x.grad.isfinite().all() for x in tensors)


def test_a_graph_holds_its_shard(pool):
    assert pool.run(2, forgotten) == [True, True]


def destroyed(group):
    own = dist.new_group([0, 1])
    if group.rank() > 1:
        return ""
    out = attend(*drawn(), DENSE, shard=SequenceShard(own, 16), exchange="gather")
    dist.destroy_process_group(own)
    return outcome_of(out.sum().backward)


def test_a_group_that_is_gone_is_reported_with_the_call(pool):
    for rank, message in enumerate(pool.run(8, destroyed)[:2]):
        expected = (
            f"RuntimeError: rank {rank} of 2, backward of call 0, samples 0 to 0, gradients, with ranks {1 - rank}"
        )
        assert message.startswith(expected), message


def waiting(group):
    shard = SequenceShard(group, 16)
    tensors = [x.detach() for x in drawn()]
    attend(*tensors, DENSE, shard=shard, exchange="ring")
    before = shard.comm.waited_seconds
    if group.rank():
        time.sleep(0.5)
    attend(*tensors, DENSE, shard=shard, exchange="ring")
    return shard.comm.waited_seconds - before


def test_what_a_rank_waits_is_counted(pool):
    first, _ = pool.run(2, waiting)
    assert 0.2 < first < 5


def leave(group, how, culprit):
    q, k, v = drawn()
    begin = time.perf_counter()
    try:
        if group.rank() == culprit and how == "dies early":
            os._exit(3)
        shard = SequenceShard(group, 16)
        attend(q, k, v, DENSE, shard=shard, exchange="ring")
        if group.rank() == culprit:
            if how == "dies":
                os._exit(3)
            time.sleep(12)
        begin = time.perf_counter()
        attend(q, k, v, DENSE, shard=shard, exchange="ring")
    except RuntimeError as error:
        return str(error), time.perf_counter() - begin


LEAVING = [("dies", 2), ("stalls", 2), ("dies", 4), ("dies early", 2)]


@pytest.mark.parametrize(("how", "ranks"), tiered(LEAVING, quick=[("dies", 4)]))
def test_a_peer_that_leaves_ends_the_others_within_the_timeout(how, ranks):
    pool = Pool(ranks, timeout=4)
    culprit = ranks // 2
    try:
        for pipe in pool.pipes:
            pipe.send((leave, ranks, (how, culprit)))
        for rank, pipe in enumerate(pool.pipes):
            if rank == culprit:
                continue
            assert pipe.poll(60)
            is_result, (message, seconds) = pipe.recv()
            assert is_result
            assert seconds < 10
            if how == "dies early":
                assert message.startswith(f"rank {rank} of {ranks}, makes a shard: ")
            else:
                assert message.startswith(f"rank {rank} of {ranks}, forward of call 1, samples 0 to 0, keys and values")
                if ranks == 2 or rank == culprit + 1:  # who hears of the culprit first; others wait for who waits
                    assert f", from rank {culprit}: " in message
    finally:
        pool.close(kill=True)
