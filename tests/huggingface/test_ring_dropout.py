"""Attention dropout of models of transformers: ranks that share a sequence drop the pairs that one process drops."""

import pytest
import torch
from architectures import ARCHITECTURES, batch, model
from contexts import made
from tiers import tiered

from lightning_longnet import SequenceContext, attach_context

NAMES = [name for name in ARCHITECTURES if name not in ("GPT-2", "Llama 4")]


def logits(group, name, kind, number):
    """Return the logits of a step in training, and of the same step again, with the gradient of the embedding."""
    net = model(name, "ring", attention_dropout=0.3).train()
    context = SequenceContext(seed=5) if group is None else made(group)
    context.seed = 5
    attach_context(net, context)
    tensors = {each: x for each, x in batch(kind).items() if each not in ("labels", "real")}
    part = context.split(tensors)
    results = []
    for _ in range(2):
        context.begin_step(number)
        results.append(net(**part).logits)
    results[0].square().sum().backward()
    gradient = net.get_input_embeddings().weight.grad
    if group is not None:
        torch.distributed.all_reduce(gradient, group=group)
    return context.positions, *(x.detach() for x in results), gradient


@pytest.mark.parametrize(
    ("name", "kind"),
    tiered([(name, ("plain", "packed")[i % 2]) for i, name in enumerate(NAMES)], quick=[("Llama", "plain")]),
)
def test_ranks_drop_the_pairs_that_one_process_drops(pool, name, kind):
    _, whole, again, gradient = logits(None, name, kind, 3)
    _, other, _, _ = logits(None, name, kind, 4)
    assert torch.equal(whole, again)
    assert (whole - other).norm() > 1e-4 * whole.norm()
    for positions, part, repeated, summed in pool.run(2, logits, name, kind, 3):
        assert torch.equal(part, repeated)
        assert (part - whole[:, positions]).norm() < 1e-6 * whole.norm()
        assert (summed - gradient).norm() < 1e-6 * gradient.norm()
