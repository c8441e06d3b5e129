"""Plain dropout on parts of sequences on a GPU, whose generator is another than the CPU's."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_longnet import SequenceContext, attach_context
from lightning_longnet.sequence.position import MeshPosition

LENGTH = 12


def dropped(rank, step, call):
    """What a rank of two drops in two calls, and the generators' next numbers."""
    context = SequenceContext(position=MeshPosition(2, rank))
    context.begin(2 * LENGTH)
    context.begin_step(step)
    module = nn.Dropout(0.5)
    attach_context(module, context)
    torch.manual_seed(5)
    result = [call(module, torch.ones(2, LENGTH, 8, device="cuda", requires_grad=True)) for _ in range(2)]
    return result, torch.rand(3), torch.rand(3, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("step", [None, 3])
def test_ranks_drop_other_elements_and_their_generators_stay_in_step(step):
    (ours, *after), (theirs, *after_too) = (dropped(rank, step, lambda f, x: f(x)) for rank in range(2))
    assert not torch.equal(ours[0], ours[1])
    assert not torch.equal(ours[0], theirs[0])
    assert all(torch.equal(a, b) for a, b in zip(after, after_too, strict=True))
    again, *_ = dropped(0, step, lambda f, x: f(x))
    assert torch.equal(again[0], ours[0])


def recomputed(module, x):
    out = checkpoint(module, x, use_reentrant=False)
    out.sum().backward()
    return out == 2, x.grad == 2


@pytest.mark.gpu
@pytest.mark.parametrize("step", [None, 3])
def test_recomputed_activations_drop_the_same(step):
    result, *_ = dropped(1, step, recomputed)
    assert all(torch.equal(out, grad) for out, grad in result)
