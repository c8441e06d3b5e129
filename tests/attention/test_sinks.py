"""Sinks: one more logit of the softmax for each head, against a dense softmax that is written out here."""

import pytest
import torch
from split import LONGNET

from lightning_longnet import Pattern, SequenceShard, attend

PATTERNS = {
    "longnet": LONGNET,
    "window": Pattern.window(5, is_causal=True),
    "set": Pattern.dilated((4, 8), (1, 2), multiplicity="set"),
    "rows without keys": Pattern.dilated((8,), (4,)),
}


def tensors(batch=2, length=24, heads=4, kv_heads=2, dim=8, value_dim=8):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, length, heads, dim), (batch, length, kv_heads, dim), (batch, length, kv_heads, value_dim)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    sinks = torch.randn(heads, generator=generator, dtype=torch.float64).requires_grad_()
    grad = torch.randn(batch, length, heads, value_dim, generator=generator, dtype=torch.float64)
    return q, k, v, sinks, grad


def dense(q, k, v, sinks, pattern, padding):
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[3] ** 0.5
    counts = pattern.mask(q.shape[1], heads, heads // group).double().log()
    scores = scores + counts
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None, :], -torch.inf)
    logits = torch.cat((scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
    out = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1)[..., :-1], v)
    return out, logits.logsumexp(-1)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("kernel", ["sdpa", "eager", "reference"])
@pytest.mark.parametrize("is_padded", [False, True])
def test_equals_a_dense_softmax(name, kernel, is_padded):
    q, k, v, sinks, grad = tensors()
    padding = (torch.arange(24) > torch.tensor([[19], [23]])) if is_padded else None
    out, lse = attend(q, k, v, PATTERNS[name], sinks=sinks, kernel=kernel, key_padding_mask=padding, return_lse=True)
    truth, true_lse = dense(q, k, v, sinks, PATTERNS[name], padding)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, true_lse, rtol=0, atol=1e-12)
    result, expected = (torch.autograd.grad(x, (q, k, v, sinks), grad) for x in (out, truth))
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kernel", ["auto", "eager", "reference"])
def test_an_infinite_sink_is_none(kernel):
    q, k, v, _, grad = tensors()
    padding = torch.arange(24).expand(2, 24) < 4
    pattern, results = Pattern.dilated((4,), (1,)), []
    for sinks in (torch.full((4,), -torch.inf, dtype=torch.float64, requires_grad=True), None):
        out, lse = attend(q, k, v, pattern, sinks=sinks, key_padding_mask=padding, kernel=kernel, return_lse=True)
        assert (out[:, :4] == 0).all()
        assert (lse[..., :4] == -torch.inf).all()
        results.append([out, *torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)])
        if sinks is not None and kernel != "reference":
            assert (torch.autograd.grad(out, sinks, grad)[0] == 0).all()
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def with_sinks_on_one_rank(group):
    q, k, v, sinks, _ = (x.detach() for x in tensors())
    shard = SequenceShard(group, 12)
    rows = shard.tokens()
    with pytest.raises(ValueError, match="presence of sinks must be equal on all ranks of a shard"):
        attend(q[:, rows], k[:, rows], v[:, rows], LONGNET, shard=shard, sinks=sinks if group.rank() else None)


def test_sinks_on_one_rank_are_an_error_on_all(pool):
    pool.run(2, with_sinks_on_one_rank)


def split(group, exchange, ordering):
    """Return this rank's out, lse and gradients, and its tokens."""
    q, k, v, sinks, grad = tensors()
    shard = SequenceShard(group, 24 // group.size())
    rows = shard.tokens()
    own = [x.detach()[:, rows].requires_grad_() for x in (q, k, v)]
    logits = sinks.detach().requires_grad_()
    pattern = PATTERNS["longnet"] if ordering == "raster" else Pattern.dilated((8,), (2,), is_causal=True)
    out = attend(*own, pattern, sinks=logits, shard=shard, exchange=exchange, ordering=ordering)
    gradients = torch.autograd.grad(out, (*own, logits), grad[:, rows])
    return rows, out.detach(), *gradients


@pytest.mark.parametrize("ordering", ["raster", "hilbert"])
def test_the_sum_over_ranks_is_the_gradient(pool, ordering):
    pattern = PATTERNS["longnet"] if ordering == "raster" else Pattern.dilated((8,), (2,), is_causal=True)
    q, k, v, sinks, grad = tensors()
    out = attend(q, k, v, pattern, sinks=sinks, ordering=ordering)
    expected = torch.autograd.grad(out, (q, k, v, sinks), grad)
    for exchange in ("gather", "ring", "swap"):
        parts = pool.run(2, split, exchange, ordering)
        total = sum(part[5] for part in parts)
        torch.testing.assert_close(total, expected[3], rtol=0, atol=1e-11)
        for rows, part, *gradients in parts:
            torch.testing.assert_close(part, out[:, rows].detach(), rtol=0, atol=1e-12)
            for ours, whole in zip(gradients[:3], expected[:3], strict=True):
                torch.testing.assert_close(ours, whole[:, rows], rtol=0, atol=1e-11)


def test_other_sinks_are_refused():
    q, k, v, sinks, _ = tensors()
    for wrong, message in [
        (sinks[:3], r"sinks must be a floating-point tensor of one logit a head, \(4,\), got torch.float64 \(3,\)"),
        (torch.zeros(4, dtype=torch.long), r"got torch.int64 \(4,\)"),
        (0.0, "got float"),
    ]:
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, LONGNET, sinks=wrong)
    with pytest.raises(ValueError, match="sinks must be None where mix is 'detached'"):
        attend(q, k, v, LONGNET, sinks=sinks, mix="detached")
