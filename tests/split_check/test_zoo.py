"""The split check on modules as users write them: no right one is accused, each wrong one is found, no rank waits."""

import random

import numpy as np
import pytest
import torch
from right_modules import RIGHT, OwnCollectives, Popping
from test_split_check import batch_of, connected
from wrong_modules import WRONG, LockOfFirst, NoneWithoutLabels
from zoo import DIMS

from lightning_longnet import attach_context, check_split
from lightning_longnet.split_check import ranks as ranks_of_check

# its own collectives count positions in the order of the ranks, which is wrong with zigzag
RIGHT_IN_ANY_ORDER = [kind for kind in RIGHT if kind is not OwnCollectives]


def states(module):
    return (
        {name: (x, x.clone()) for name, x in module.state_dict().items()},
        {name: (x.grad, x.requires_grad) for name, x in module.named_parameters()},
        len(getattr(module, "features", ())),
    )


def same(before, after):
    for (name, (x, was)), (now, _) in zip(before[0].items(), after[0].values(), strict=True):
        assert x.data_ptr() == now.data_ptr(), name
        assert torch.equal(was, now), name
    assert before[1:] == after[1:]


def verdicts(rank, world, size, kinds, placement="contiguous", patience=30.0):
    ranks_of_check.PATIENCE = patience
    context, result = connected(rank, world, size), {}
    context.placement = context._splitter.placement = placement
    for kind in kinds:
        torch.manual_seed(rank)
        module = kind()
        batch = kind.more(batch_of(context.data_parallel_rank, max(kind.LENGTH, world)))
        attach_context(module, context)
        if hasattr(module, "begin"):
            module.begin()
        module_before = states(module)
        generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        result[kind.__name__] = check_split(
            module, lambda copy, part: copy.step(part), batch, context, action="warn", sequence_dims=DIMS
        )
        same(module_before, states(module))
        assert torch.equal(torch.get_rng_state(), generators[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == generators[1:]
        assert torch.distributed.get_world_size() == world
        assert not context.is_split
    return result


pytestmark = pytest.mark.filterwarnings("ignore:the split check is inconclusive", "ignore:the module computes")


@pytest.mark.parametrize(
    ("world", "size", "kinds", "placement"),
    [
        pytest.param(2, 2, RIGHT, "contiguous", marks=pytest.mark.full),
        pytest.param(2, 2, RIGHT_IN_ANY_ORDER, "zigzag", marks=pytest.mark.full),
        pytest.param(3, 3, RIGHT, "contiguous", marks=pytest.mark.full),
        pytest.param(4, 2, RIGHT, "contiguous", marks=pytest.mark.full),
    ],
)
def test_no_right_module_is_accused(trainers, world, size, kinds, placement):
    expected = {kind.__name__: getattr(kind, "KIND", "equal") for kind in kinds}
    for result in trainers.run(world, verdicts, size, kinds, placement):
        for name, verdict in result.items():
            kind = expected[name]
            assert verdict.kind in (kind, "equal" if kind == "inconclusive" else kind), (name, verdict)
            if verdict.kind == "equal":
                assert verdict.error < 1e-5, (name, verdict)
            assert not verdict.side_effects, (name, verdict)


@pytest.mark.parametrize(
    ("world", "size", "kinds", "placement"),
    [
        pytest.param(2, 2, WRONG, "contiguous", marks=pytest.mark.full),
        pytest.param(2, 2, WRONG, "zigzag", marks=pytest.mark.full),
        pytest.param(3, 3, WRONG, "contiguous", marks=pytest.mark.full),
        pytest.param(4, 2, WRONG, "contiguous", marks=pytest.mark.full),
        pytest.param(2, 2, WRONG[::3], "contiguous", marks=pytest.mark.long),
    ],
)
def test_each_wrong_module_is_found(trainers, world, size, kinds, placement):
    every = trainers.run(world, verdicts, size, kinds, placement)
    assert all(result == every[0] for result in every)
    for name, verdict in every[0].items():
        assert verdict.kind == "different", (name, verdict)


@pytest.mark.long
def test_a_rank_that_leaves_its_step_is_a_verdict_on_all(trainers):
    for result in trainers.run(2, verdicts, 2, [NoneWithoutLabels, Popping], "contiguous", 2.0):
        assert result["NoneWithoutLabels"].kind == "different"
        assert "one waits for a message of others" in result["NoneWithoutLabels"].message
        assert result["Popping"].kind == "equal"  # the groups of the run are as they were


def test_a_module_that_is_copied_on_some_ranks_only(trainers):
    for result in trainers.run(2, verdicts, 2, [LockOfFirst]):
        assert result["LockOfFirst"].kind == "not checked"
        assert "no copies" in result["LockOfFirst"].message
