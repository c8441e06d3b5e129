"""Softcap: scores bounded by a tanh, against a dense softmax that is written out here."""

from itertools import product

import pytest
import torch
from split import LONGNET
from tiers import tiered

from lightning_longnet import Guard, Pattern, SequenceShard, attend, explain

CAP = 0.8  # of scores of about 1, so that it bends all of them
PATTERNS = {
    "longnet": LONGNET,
    "window": Pattern.window(5, is_causal=True),
    "set": Pattern.dilated((4, 8), (1, 2), multiplicity="set"),
    "rows without keys": Pattern.dilated((8,), (4,)),
    "zero keys": Pattern.dilated((7,), (2,), ragged="zero_keys"),
}


def tensors(dtype=torch.float64, batch=2, length=24, heads=4, kv_heads=2, dim=8, value_dim=8):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, length, heads, dim), (batch, length, kv_heads, dim), (batch, length, kv_heads, value_dim)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    sinks = torch.randn(heads, generator=generator, dtype=torch.float64).requires_grad_()
    grad = torch.randn(batch, length, heads, value_dim, generator=generator, dtype=torch.float64).to(dtype)
    return *(x.requires_grad_() for x in (q, k, v)), sinks, grad


def dense(q, k, v, pattern, *, sinks=None, padding=None, softcap=CAP):
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[3] ** 0.5
    scores = softcap * torch.tanh(scores / softcap) + pattern.mask(q.shape[1], heads, heads // group).double().log()
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None, :], -torch.inf)
    null = pattern.null_keys(q.shape[1], heads, heads // group).double().log()
    logits = [scores, null[None, ..., None].expand(*scores.shape[:3], 1)]
    if sinks is not None:
        logits.append(sinks[None, :, None, None].expand(*scores.shape[:3], 1))
    lse = torch.cat(logits, -1).logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("is_padded", [False, True])
def test_equals_a_dense_softmax(name, kernel, is_padded):
    q, k, v, sinks, grad = tensors(value_dim=6 if is_padded else 8)
    padding = (torch.arange(24) > torch.tensor([[19], [23]])) if is_padded else None
    options = {"sinks": sinks, "key_padding_mask": padding, "softcap": CAP}
    out, lse = attend(q, k, v, PATTERNS[name], kernel=kernel, return_lse=True, **options)
    truth, true_lse = dense(q, k, v, PATTERNS[name], sinks=sinks, padding=padding)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, true_lse, rtol=0, atol=1e-12)
    result, expected = (torch.autograd.grad(x, (q, k, v, sinks), grad) for x in (out, truth))
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("options", [{"mix": "detached"}, {"dropout": 0.3, "dropout_seed": 5}], ids=["mix", "dropout"])
def test_the_kernel_gives_the_gradients_of_the_reference(options):
    q, k, v, _, grad = tensors()
    results = []
    for kernel in ("eager", "reference"):
        out = attend(q, k, v, LONGNET, softcap=CAP, kernel=kernel, **options)
        results.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_scores_that_overflow_are_bounded():
    q, k, v, _, grad = tensors(torch.float32)
    with torch.no_grad():
        q.abs_().mul_(1e30)  # of one sign, as inf - inf is NaN in a product already
        k.abs_().mul_(1e30)
    out = attend(q, k, v, LONGNET, softcap=CAP)
    assert out.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out, (q, k, v), grad))


def test_bfloat16_is_close():
    q, k, v, _, grad = tensors(torch.bfloat16)
    out = attend(q, k, v, LONGNET, softcap=CAP)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth, _ = dense(*wide, LONGNET)
    pairs = zip(
        (out, *torch.autograd.grad(out, (q, k, v), grad)),
        (truth, *torch.autograd.grad(truth, wide, grad.double())),
        strict=True,
    )
    for ours, theirs in pairs:
        assert (ours.double() - theirs).norm() <= 0.01 * theirs.norm()


def split(group, exchange, ordering, placement, lengths):
    """Return this rank's tokens, out and gradients."""
    q, k, v, sinks, grad = tensors(value_dim=6)
    shard = SequenceShard(group, lengths[group.rank()], placement)
    rows = shard.tokens()
    own = [x.detach()[:, rows].requires_grad_() for x in (q, k, v)]
    logits = sinks.detach().requires_grad_()
    options = {"sinks": logits, "softcap": CAP, "exchange": exchange, "ordering": ordering}
    out = attend(*own, LONGNET, shard=shard, **options)
    return rows, out.detach(), *torch.autograd.grad(out, (*own, logits), grad[:, rows])


WAYS = list(product(["gather", "ring", "swap"], ["raster", "hilbert"], ["contiguous", "zigzag"]))


@pytest.mark.parametrize(
    ("exchange", "ordering", "placement"), tiered(WAYS, [way for way in WAYS if way[1:] == ("raster", "zigzag")])
)
def test_parts_give_the_gradients_of_the_whole(pool, exchange, ordering, placement):
    q, k, v, sinks, grad = tensors(value_dim=6)
    out = attend(q, k, v, LONGNET, sinks=sinks, softcap=CAP, ordering=ordering)
    expected = torch.autograd.grad(out, (q, k, v, sinks), grad)
    parts = pool.run(2, split, exchange, ordering, placement, (13, 11))
    torch.testing.assert_close(sum(part[5] for part in parts), expected[3], rtol=0, atol=1e-11)
    for rows, part, *gradients in parts:
        torch.testing.assert_close(part, out[:, rows].detach(), rtol=0, atol=1e-12)
        for ours, whole in zip(gradients[:3], expected[:3], strict=True):
            torch.testing.assert_close(ours, whole[:, rows], rtol=0, atol=1e-11)


def another_softcap_on_one_rank(group):
    q, k, v, _, _ = (x.detach() for x in tensors())
    shard = SequenceShard(group, 12)
    rows = shard.tokens()
    with pytest.raises(ValueError, match="softcap must be equal on all ranks of a shard"):
        attend(q[:, rows], k[:, rows], v[:, rows], LONGNET, shard=shard, softcap=1.0 + group.rank())


def test_another_softcap_on_one_rank_is_an_error_on_all(pool):
    pool.run(2, another_softcap_on_one_rank)


def test_kernels_without_a_softcap_refuse_it():
    q, k, v, _, _ = tensors()
    with pytest.raises(ValueError, match=r"kernel='sdpa' cannot serve this call: cannot bound scores by a softcap"):
        attend(q, k, v, LONGNET, softcap=CAP, kernel="sdpa")
    assert explain(q, k, v, LONGNET).chosen == "sdpa"
    assert explain(q, k, v, LONGNET, softcap=CAP).chosen == "eager"
    for wrong in (0, -1.0, float("inf"), float("nan"), "30", True):
        with pytest.raises(ValueError, match="softcap must be a positive, finite number or None"):
            attend(q, k, v, LONGNET, softcap=wrong)


def test_a_guard_tries_the_kernel_with_a_softcap():
    q, k, v, _, _ = tensors()
    guard = Guard()
    out = guard.attend(q, k, v, LONGNET, softcap=CAP)
    torch.testing.assert_close(out, dense(q, k, v, LONGNET)[0], rtol=0, atol=1e-12)
    guard.attend(q, k, v, LONGNET)
    assert guard.counts["preflights"] == 2
