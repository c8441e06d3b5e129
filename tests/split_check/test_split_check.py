"""The split check: every fault is seen and named, and no right module is accused."""

import copy
import os
import random
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
from faults import FAULTS, RIGHT, VOCABULARY, Base, Convolution, Counting, Cumulative, Whole

from lightning_longnet import SequenceContext, SequencePart, attach_context, sequence_context, sequence_mesh
from lightning_longnet.sequence.parts import part_of
from lightning_longnet.split_check import SplitMismatch, check_split
from lightning_longnet.split_check.sample import sample, sample_lengths

LENGTH = 312
CAUSES = {kind.__name__: (name, cause) for kind, name, cause in FAULTS}


def connected(rank, world, sequence_parallel_size):
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo")
    return SequenceContext(sequence_mesh(sequence_parallel_size, "cpu", 60))


def batch_of(group, length=LENGTH, rows=3):
    generator = torch.Generator().manual_seed(group)
    ids = torch.randint(VOCABULARY, (rows, length + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[:, : length // 4] = -100
    return {"input_ids": ids[:, :-1], "labels": labels}


def verdicts(rank, world, size, kinds, length=LENGTH, action="warn", **settings):
    context, result = connected(rank, world, size), {}
    for kind in kinds:
        torch.manual_seed(rank)  # ranks begin with values of their own
        module = kind()
        batch = batch_of(context.data_parallel_rank, length)
        result[kind.__name__] = check_split(
            module, lambda copy, part: copy.step(part), batch, context, action=action, **settings
        )
    return result


@pytest.mark.filterwarnings("ignore:the module computes")
@pytest.mark.parametrize(
    ("world", "size", "faults"),
    [
        (2, 2, [*FAULTS[::4], FAULTS[-1]]),
        pytest.param(2, 2, FAULTS, marks=pytest.mark.full),
        pytest.param(4, 2, FAULTS, marks=pytest.mark.full),
    ],
)
def test_each_fault_is_found_and_named(trainers, world, size, faults):
    result = trainers.run(world, verdicts, size, [kind for kind, *_ in faults])
    assert all(rank == result[0] for rank in result)
    for name, verdict in result[0].items():
        module, cause = CAUSES[name]
        assert verdict.kind == "different", (name, verdict)
        if module is None:
            assert verdict.place is None, (name, verdict)
        else:
            assert verdict.place is not None, (name, verdict)
            assert (verdict.place.name, verdict.place.causes[:1]) == (module, (cause,)), (name, verdict)


@pytest.mark.parametrize(
    ("world", "size", "kinds"),
    [
        (2, 2, RIGHT[::4]),
        *(pytest.param(*many, RIGHT, marks=pytest.mark.long) for many in [(3, 3)]),
        *(pytest.param(*many, RIGHT, marks=pytest.mark.full) for many in [(2, 2), (4, 2), (4, 4)]),
    ],
)
def test_no_right_module_is_accused(trainers, world, size, kinds):
    result = trainers.run(world, verdicts, size, kinds)
    for rank in result:
        for name, verdict in rank.items():
            assert verdict.kind == "equal", (name, verdict)
            assert verdict.error < 1e-6, (name, verdict)
            assert not verdict.side_effects, (name, verdict)
            assert verdict.drops_directly == (name == "Dropped"), "torch's function is called by the step itself"


class Random(Base):
    """Noise on each token, and a fault."""

    def mixing(self, x):
        return x.cumsum(1) * torch.rand(x.shape)


class RandomAndRight(Base):
    def mixing(self, x):
        return x * torch.rand(())


class Uncopied(Base):
    def build(self):
        self.lock = threading.Lock()


class NoLabels(Base):
    def step(self, batch):
        return super().step({**batch, "labels": torch.full_like(batch["labels"], -100)}) * float("nan")


@pytest.mark.filterwarnings("ignore:the split check is inconclusive")
def test_what_is_no_verdict_says_why(trainers):
    kinds = [Random, RandomAndRight, Uncopied, NoLabels]
    result = trainers.run(2, verdicts, 2, kinds)[0]
    assert result["Random"].kind == "inconclusive"
    assert "draws random numbers" in result["Random"].message
    assert result["RandomAndRight"].kind == "equal"
    assert result["Uncopied"].kind == result["NoLabels"].kind == "not checked"
    assert "cannot be copied: cannot pickle '_thread.lock' object" in result["Uncopied"].message
    assert "not finite" in result["NoLabels"].message


def left_alone(rank, world):
    context = connected(rank, world, 2)
    module = Counting()
    module.extra = [torch.ones(2)]
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    batch, before = batch_of(0), copy.deepcopy(module)
    whole = copy.deepcopy(batch)
    attach_context(module, context)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    verdict = check_split(module, lambda each, part: each.step(part), batch, context)
    assert verdict.kind == "equal"
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert (module.calls, module.seen, module.training) == (0, [], True)
    assert sequence_context(module) is context
    assert context.length is None
    assert not context.is_split
    for (name, a), b in zip(module.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(module.parameters(), before.parameters(), strict=True):
        assert torch.equal(a.grad, torch.ones_like(b))
        assert a.dtype is torch.float32
    for name, x in batch.items():
        assert torch.equal(x, whole[name])


def test_module_batch_context_and_generators_stay_as_they_were(trainers):
    trainers.run(2, left_alone)


def raising(rank, world):
    context = connected(rank, world, 2)
    with pytest.raises(SplitMismatch, match=r"history \(Functional\) is the first(.|\n)*Likely cause: a function over"):
        check_split(Cumulative(), lambda each, part: each.step(part), batch_of(0), context)
    off = check_split(Cumulative(), lambda each, part: each.step(part), batch_of(0), context, action="off")
    with pytest.raises(ValueError, match="split_check must be one of 'error', 'warn', 'off', got 'maybe'"):
        check_split(Cumulative(), lambda each, part: each.step(part), batch_of(0), context, action="maybe")
    return off.kind


def test_a_difference_raises_on_all_ranks_unless_it_is_to_warn(trainers):
    assert trainers.run(2, raising) == ["not checked", "not checked"]


def read_in_parts(rank, world, kind):
    context = connected(rank, world, 2)
    batch = batch_of(0)
    placement = context.placement_of(LENGTH)
    tensors = {name: part_of(x, placement, rank, 1) for name, x in batch.items()}
    part = SequencePart(tensors, LENGTH, placement.chunks(rank), ("a", "b", "c"))
    return check_split(kind(), lambda each, part: each.step(part), part, context, action="warn").kind


@pytest.mark.filterwarnings("ignore:the module computes")
def test_batches_that_are_read_in_parts_are_checked_on_their_first_tokens(trainers):
    assert trainers.run(2, read_in_parts, Whole) == ["equal", "equal"]
    assert trainers.run(2, read_in_parts, Convolution) == ["different", "different"]


@pytest.mark.parametrize(("length", "ranks"), [(300, 2), (300, 3), (37, 2), (10**6, 64), (5, 4), (4, 4), (130, 2)])
def test_lengths_are_odd_uneven_and_no_size_of_a_parameter(length, ranks):
    lengths = sample_lengths(length, ranks, {129, 64, 32, 16})
    short, *others = lengths
    assert others == ([length] if length < 8192 and short != length else [])
    if short != length:
        assert short % 2 == 1
        assert short % ranks
        assert not {short, short // ranks, short // ranks + 1} & {129, 64, 32, 16} or length < 40


def test_the_piece_is_where_the_labels_are():
    labels = torch.full((2, 50), -100)
    labels[:, 30:38] = 1
    piece = sample({"input_ids": torch.arange(50).expand(2, -1), "labels": labels}, {}, 9)
    assert (piece["labels"] != -100).sum() == 16
    assert piece["input_ids"].shape == (2, 9)
