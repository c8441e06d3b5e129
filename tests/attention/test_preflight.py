"""Kernels that fail, memory that is short, errors in the middle of a step: on all ranks, told, and never guessed."""

import logging
import sys
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from unittest.mock import patch

import brute
import pytest
import torch
import torch.distributed as dist
from brute import Shown
from contexts import made
from pool import Pool
from tiers import tiered

from lightning_longnet import (
    DilatedAttention,
    Guard,
    LongNet,
    LongNetConfig,
    Pattern,
    SequenceShard,
    attach_context,
    attend,
    explain,
)
from lightning_longnet.attention import guard as guards
from lightning_longnet.attention.kernels import eager, sdpa

PATTERN = Pattern.dilated((8, 32), (1, 2))
SHOWN = [Shown(8), Shown(32, 2)]
LENGTH = 24
NOTHING = {"preflights": 0, "replacements": 0, "refusals": 0, "failures": 0}


def drawn(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 2, LENGTH, 4, 6, dtype=torch.float64, generator=generator).to(dtype).unbind()


def truth():
    *wide, grad = drawn()
    wide = [x.requires_grad_() for x in wide]
    out = brute.attention(*wide, [brute.counts(SHOWN, "multiset", LENGTH, 4)] * 2, 6**-0.5)[0]
    return out.detach(), *torch.autograd.grad(out, wide, grad)


class Lines(logging.Handler):
    """What the guard logs."""

    def __enter__(self):
        self.result = []
        guards.logger.addHandler(self)
        guards.logger.setLevel(logging.INFO)
        return self

    def emit(self, record):
        self.result.append(f"{record.levelname}: {record.getMessage()}")

    def __exit__(self, *_):
        guards.logger.removeHandler(self)
        guards.logger.setLevel(logging.NOTSET)


@contextmanager
def profiled():
    """The functions of the package that are called inside the block, with the lines at which they begin."""
    calls = []

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and "lightning_longnet" in code.co_filename:
            calls.append((code.co_name, code.co_filename, code.co_firstlineno))

    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def raising(*_):
    raise RuntimeError("no kernel image is available")


def backward_of_zeros(grad, q, k, v, *_):
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


FAULTS = {"raises": ("forward", raising), "gives zeros": ("backward", backward_of_zeros)}


def stepped(shard, guard, at):
    *leaves, grad = (x[:, at] for x in drawn())
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = guard.attend(*leaves, PATTERN, shard=shard)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def with_a_broken_kernel(group, broken_rank, fault):
    """Two steps: what came of the second, the counts and the log, and how often the kernel was called after."""
    shard, guard = SequenceShard(group, LENGTH // group.size()), Guard()
    name, function = FAULTS[fault]
    with Lines() as log:
        if group.rank() == broken_rank:
            with patch.object(sdpa, name, function):
                stepped(shard, guard, shard.tokens())
        else:
            stepped(shard, guard, shard.tokens())
        with patch.object(sdpa, "forward", side_effect=AssertionError("was called")):
            result = stepped(shard, guard, shard.tokens())
    return shard.tokens(), result, guard.counts, log.result


@pytest.mark.parametrize("fault", tiered(FAULTS, quick=["gives zeros"]))
def test_all_ranks_replace_a_kernel_that_fails_on_one(pool, fault):
    for world in (1, 2, 4):
        for rank, (at, result, counts, lines) in enumerate(pool.run(world, with_a_broken_kernel, world - 1, fault)):
            for ours, true in zip(result, truth(), strict=True):
                assert (ours - true[:, at]).abs().max() <= 1e-10 * max(1, true.abs().max())
            assert counts == NOTHING | {"preflights": 1, "replacements": 1}
            preflight, replaced = lines
            who = f"rank {rank} of {world} that share sequences"
            assert preflight.startswith(f"INFO: {who}: preflight on cpu, float64, heads of 6: kernels that work: eager")
            assert replaced.startswith(f"WARNING: {who}: kernel 'sdpa' is replaced with 'eager' for calls on cpu")
            why = {"raises": "no kernel image", "gives zeros": "it is wrong on a few tokens"}[fault]
            assert (why if rank == world - 1 else f"it fails on rank {world - 1}, whose own log says why") in replaced


def test_a_kernel_that_works_is_kept_and_draws_nothing():
    q, k, v, _ = drawn()
    state, guard = torch.get_rng_state(), Guard()
    with torch.inference_mode(), Lines() as log, patch.object(eager, "forward", wraps=eager.forward) as plain:
        result = guard.attend(q, k, v, PATTERN)
        tried = plain.call_count
        guard.attend(q, k, v, PATTERN)
        assert plain.call_count == tried  # in the preflight alone
    assert torch.equal(torch.get_rng_state(), state)
    assert (result - truth()[0]).abs().max() < 1e-12
    assert guard.counts == NOTHING | {"preflights": 1}
    assert len(log.result) == 1


def test_each_kind_of_call_has_its_preflight():
    guard = Guard()
    for dtype, dropout, preflights in (
        (torch.float64, 0.0, 1),
        (torch.float32, 0.0, 2),
        (torch.float32, 0.1, 3),
        (torch.float64, 0.0, 3),
    ):
        guard.attend(*drawn(dtype)[:3], PATTERN, dropout=dropout)
        assert guard.counts == NOTHING | {"preflights": preflights}


def test_where_no_kernel_works_nothing_is_made_up():
    expected = pytest.raises(
        ValueError, match="no kernel can serve this call, as each that could has failed: flash: it is"
    )
    with patch.object(guards, "kernel_fault", return_value="it is broken"), expected:
        Guard().attend(*drawn()[:3], PATTERN)


def without_kernels(group, is_known):
    """Calls that were counted for one that no kernel can serve, and the results of the next step."""
    shard = SequenceShard(group, LENGTH // 2)
    if is_known:
        stepped(shard, Guard(), shard.tokens())
    before = shard.calls
    with (
        patch.object(guards, "kernel_fault", return_value="it is broken"),
        pytest.raises(ValueError, match="no kernel can"),
    ):
        stepped(shard, Guard(), shard.tokens())
    return shard.calls - before, len(stepped(shard, Guard(), shard.tokens()))


@pytest.mark.parametrize("is_known", [False, True])
def test_a_call_that_no_kernel_serves_counts_as_one_on_all_ranks(pool, is_known):
    assert pool.run(2, without_kernels, is_known) == [(1, 4)] * 2


def short_of_memory(group, poor_rank):
    shard, guard = SequenceShard(group, LENGTH // 2), Guard()
    free = patch.object(guards, "free_bytes", return_value=100 if group.rank() == poor_rank else 2**40)
    with free, pytest.raises(ValueError, match=r"memory|free") as raised:
        stepped(shard, guard, shard.tokens())
    return str(raised.value), guard.counts, len(stepped(shard, guard, shard.tokens()))


def test_all_ranks_end_where_one_has_too_little_memory(pool):
    for rank, (message, counts, results) in enumerate(pool.run(2, short_of_memory, 1)):
        about = "results alone need 0 MiB, and free are 0 MiB" if rank else "another rank, 1, has too little memory"
        assert message.startswith(f"rank {rank} of 2 that share sequences: ")
        assert about in message
        assert "sequence_parallel_size" in message
        assert counts == NOTHING | {"refusals": 1, "preflights": 1}
        assert results == 4  # once there is enough


def failing_later(group, what):
    """The first step is good; in the next one the kernel of rank 1 fails."""
    own = dist.new_group([0, 1], timeout=timedelta(seconds=3))
    shard, guard = SequenceShard(own, LENGTH // 2), Guard()
    stepped(shard, guard, shard.tokens())
    broken = patch.object(sdpa, what, side_effect=RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    with Lines() as log:
        try:
            if group.rank():
                with broken, guard.advised_errors():
                    stepped(shard, guard, shard.tokens())
            else:
                with guard.advised_errors():
                    stepped(shard, guard, shard.tokens())
        except RuntimeError as error:
            return str(error), error.__notes__, guard.counts, log.result
    return None


@pytest.mark.parametrize("what", tiered(["forward", "backward"], quick=[]))
def test_an_error_in_a_step_ends_all_ranks_with_advice(what):
    pool = Pool(2)  # gloo's threads never rest again once a peer has given up
    try:
        (waited, *other), (raised, *first) = pool.run(2, failing_later, what)
    finally:
        pool.close(kill=True)
    assert "can't allocate memory" in raised
    assert "Memory is short: share each sequence among more ranks" in first[0][0]
    assert waited.startswith("rank 0 of 2, backward of call 1")  # in the forward it had all that it waits for
    assert other[0] == ["Another rank has ended or does something else: the first error among the ranks says why."]
    for rank, (_, counts, lines) in enumerate((other, first)):
        assert counts == NOTHING | {"preflights": 1, "failures": 1}
        assert len(lines) == 1
        expected = "DefaultCPUAllocator" if rank else "rank 0 of 2, backward of call 1"
        assert lines[0].startswith(f"ERROR: RuntimeError: {expected}")


def test_an_error_on_one_process_has_advice_and_no_second_try():
    guard = Guard()
    q, k, v, _ = drawn()
    guard.attend(q, k, v, PATTERN)
    broken = patch.object(sdpa, "forward", side_effect=RuntimeError("broken"))
    with broken as kernel, pytest.raises(RuntimeError, match="broken") as raised:
        guard.attend(q, k, v, PATTERN)
    assert kernel.call_count == 1
    assert "the kernel 'eager' is the plainest" in raised.value.__notes__[0]
    assert guard.counts == NOTHING | {"preflights": 1, "failures": 1}


def alone_among_ranks(group):
    guard = Guard()
    with Lines() as log:
        for _ in range(2):
            guard.attend(*drawn()[:3], PATTERN)
        Guard().attend(*drawn()[:3], PATTERN, is_placed=True)
    return [line for line in log.result if "WARNING" in line]


def test_whole_sequences_on_each_of_many_ranks_are_no_secret(pool):
    (result,) = pool.run(1, alone_among_ranks)
    assert result == [
        "WARNING: 8 ranks are connected, and attention is given whole sequences on each: a strategy or attach_context "
        "splits them"
    ]


@pytest.mark.parametrize("recompute", ["everything", "all but attention"])
def test_a_preflight_is_no_part_of_what_is_computed_again(recompute):
    config = {"vocab_size": 16, "dim": 16, "layers": 2, "heads": 2, "pattern": PATTERN}
    model = LongNet(LongNetConfig(**config, preset="production", recompute=recompute))
    model(torch.arange(16)[None]).square().mean().backward()
    assert model.guard.counts == NOTHING | {"preflights": 1}


def test_under_autocast_the_kernels_are_tried_in_its_dtype():
    with Lines() as log, torch.autocast("cpu", torch.bfloat16):
        guard = Guard()
        guard.attend(*drawn(torch.float32)[:3], PATTERN)
        guard.attend(*drawn(torch.bfloat16)[:3], PATTERN)
    assert "preflight on cpu, bfloat16," in log.result[0]
    assert guard.counts == NOTHING | {"preflights": 1}


def first_alone(group):
    shard, guard = SequenceShard(group, LENGTH // 2), Guard()
    if group.rank() == 0:
        guard.attend(*drawn()[:3], PATTERN, is_placed=True)
    stepped(shard, guard, shard.tokens())
    return guard.counts["preflights"]


def test_a_verdict_of_one_rank_alone_is_not_agreed_on(pool):
    assert pool.run(2, first_alone) == [2, 1]


def wrong_first(group, name, value):
    shard, guard = SequenceShard(group, LENGTH // 2), Guard()
    q, k, v, _ = (x[:, shard.tokens()] for x in drawn())
    with pytest.raises(ValueError, match=r".") as raised:
        guard.attend(q, k, v, PATTERN, shard=shard, **({name: value} if group.rank() else {}))
    stepped(shard, guard, shard.tokens())
    return str(raised.value)


@pytest.mark.parametrize(("name", "value"), [("kernel", "reference"), ("mix", "vague"), ("scale", -1.0)])
def test_arguments_of_one_rank_that_are_wrong_are_reported_on_all(pool, name, value):
    other, own = pool.run(2, wrong_first, name, value)
    assert own.startswith(f"{name} must ")
    assert other.startswith("rank 1 of the group was given arguments that do not fit")


def raising_step(q, k, v, grad):
    attend(q, k, v, PATTERN).backward(grad)
    raise RuntimeError("broken")


@pytest.mark.parametrize(("what", "counted"), [("forward", 1), ("backward", 1), (None, 0)])
def test_errors_of_attention_have_advice_and_those_of_the_model_have_none(what, counted):
    guard = Guard()
    q, k, v, grad = drawn()
    q.requires_grad_()
    broken = patch.object(sdpa, what, side_effect=RuntimeError("broken")) if what else nullcontext()
    with pytest.raises(RuntimeError, match="broken") as raised, broken, guard.advised_errors():
        raising_step(q, k, v, grad)
    assert guard.counts == NOTHING | {"failures": counted}
    notes = getattr(raised.value, "__notes__", [])
    assert ["the kernel 'eager' is the plainest" in note for note in notes] == [True] * counted


def layered(guard, **options):
    return DilatedAttention(PATTERN, guard=guard, **options)


def test_a_layer_calls_attend_directly_after_the_first_call_of_a_kind():
    """What runs in a guarded layer after its first call is what runs in one without a guard."""
    guard = Guard()
    guarded, plain = layered(guard, dropout=0.1), layered(None, dropout=0.1)
    q, k, v, _ = drawn(torch.float32)
    for mode in (True, False):  # training and evaluation are two kinds where there is dropout
        guarded.train(mode)(q, k, v)
        plain.train(mode)(q, k, v)
    assert guard.counts == NOTHING | {"preflights": 2}
    calls = {}
    for name, layer in (("guarded", guarded.train()), ("plain", plain.train())):
        with profiled() as result:
            layer(q, k, v)
        calls[name] = [call for call in result if call[0] != "_attended"]
    assert calls["guarded"] == calls["plain"]
    with patch.object(Guard, "preflight", side_effect=AssertionError("was called")):
        guarded(q, k, v)
        guarded.eval()(q, k, v)
        with pytest.raises(AssertionError, match="was called"):
            guarded(q.double(), k.double(), v.double())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_layer_breaks_its_graph_in_the_first_call_alone():
    q, k, v, _ = drawn()
    guard = Guard()
    layer = layered(guard)
    first = torch.compile(layer, backend="eager")(q, k, v)
    whole = torch.compile(layer, backend="eager", fullgraph=True)(q, k, v)
    for out in (first, whole):
        assert (out - truth()[0]).abs().max() < 1e-12
    assert guard.counts == NOTHING | {"preflights": 1}


def test_a_layer_runs_without_the_kernel_that_failed():
    q, k, v, _ = drawn()
    guard = Guard()
    layers = [layered(guard, kernel=kernel) for kernel in ("auto", "sdpa")]
    with patch.object(sdpa, "forward", raising):
        first = [layer(q, k, v) for layer in layers]
    with patch.object(sdpa, "forward", side_effect=AssertionError("was called")):
        second = [layer(q, k, v) for layer in layers]
    for out in (*first, *second):
        assert (out - truth()[0]).abs().max() < 1e-12
    assert guard.counts == NOTHING | {"preflights": 1, "replacements": 1}


def test_excluded_kernels_are_replaced_and_checked():
    q, k, v, _ = drawn()
    verdict = explain(q, k, v, PATTERN, kernel="sdpa", excluded_kernels=["sdpa"])
    assert verdict.chosen == "eager"
    assert {each.kernel: each.refusals for each in verdict.verdicts}["sdpa"] == ("excluded_kernels names it",)
    with patch.object(sdpa, "forward", side_effect=AssertionError("was called")):
        result = attend(q, k, v, PATTERN, excluded_kernels={"sdpa"})
    assert (result - truth()[0]).abs().max() < 1e-12
    for wrong in ("sdpa", ["fast"]):
        with pytest.raises(ValueError, match="excluded_kernels must be a collection of 'flash', 'sdpa'"):
            attend(q, k, v, PATTERN, excluded_kernels=wrong)


def attached_again(group):
    """Preflights of a layer in whole sequences, in parts, and in parts of another context."""
    guard, counts = Guard(), []
    layer = layered(guard)
    context, other = made(group), made(group)
    for each, is_split in ((context, False), (context, True), (context, True), (other, True)):
        attach_context(layer, each)
        with patch.object(guard, "preflight", wraps=guard.preflight) as preflight:
            for _ in range(2):
                x = each.split({"x": drawn()[0]}, {"x": 1})["x"] if is_split else drawn()[0]
                with nullcontext() if is_split else each.whole():
                    layer(x, x, x)
        counts.append(preflight.call_count)
    return counts, guard.counts["preflights"]


def test_a_layer_asks_again_in_another_context(pool):
    assert pool.run(2, attached_again) == [([1, 1, 1, 1], 2)] * 2
