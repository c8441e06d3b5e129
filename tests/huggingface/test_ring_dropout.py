"""Attention dropout of models of transformers: ranks that share a sequence drop the pairs that one process drops."""

import pytest
import torch
from architectures import ARCHITECTURES, batch, model
from contexts import made
from tiers import tiered

from lightning_longnet import SequenceContext, attach_context
from lightning_longnet.huggingface.recomputation import chunk_feed_forwards

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


def dropped_in_chunks(group, chunk_tokens):
    """Return what the dropout of a feed-forward in chunks keeps of equal parts, by its output and by its gradient.

    The third result is what torch draws next.
    """
    net = model("GPT-2", "ring", resid_pdrop=0.4).train()
    chunk_feed_forwards(net, chunk_tokens)
    context = made(group)
    attach_context(net, context)
    part = context.split({each: x for each, x in batch("plain").items() if each not in ("labels", "real")})["input_ids"]
    context.begin_step(3)
    x = torch.ones(*part.shape, 32, dtype=torch.float64)[:, :26]  # of both ranks alike
    if x.shape[1] < part.shape[1]:
        x = torch.cat([x, x[:, :1]], 1)
    out = net.transformer.h[0].mlp(x)
    out.sum().backward()
    return out.detach(), net.transformer.h[0].mlp.c_proj.bias.grad, torch.rand(4)


def test_ranks_with_other_numbers_of_chunks_draw_alike_afterwards(pool):
    (first, _, drawn), (second, _, others) = pool.run(2, dropped_in_chunks, 26)
    assert (first.shape[1], second.shape[1]) == (26, 27)  # one chunk, and two
    assert torch.equal(drawn, others)


def test_ranks_drop_other_elements_of_chunks_of_their_parts(pool):
    (first, gradient, _), (second, other_gradient, _) = pool.run(2, dropped_in_chunks, 5)
    both = (first[:, :26] == 0) == (second[:, :26] == 0)
    assert abs(both.double().mean() - (0.4**2 + 0.6**2)) < 0.05
    for out, of_bias in ((first, gradient), (second, other_gradient)):  # the backward drops what the forward dropped
        torch.testing.assert_close(of_bias, (out != 0).double().sum((0, 1)) / 0.6)
