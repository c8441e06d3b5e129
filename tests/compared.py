"""Comparisons of kernels with dense scores, for one block, and of `attend` with the brute force, for a whole call."""

import brute
import drawn
import torch
from hypothesis import strategies as st

from lightning_longnet import attend
from lightning_longnet.attention.kernels.call import Call, DropoutMask
from lightning_longnet.attention.kernels.dropout import Dropout
from lightning_longnet.attention.plan.block import Block
from lightning_longnet.attention.plan.lattice import Lattice

SOME = Lattice(range(1), rows=1, step=1, head=0, heads=1)  # a kernel is given its rows, and does not look


@st.composite
def calls(draw, rows=12):
    """Draw a block in which each query has a key, with the other properties that a plan ensures."""
    kv_heads, group, queries, keys = (draw(st.integers(1, n)) for n in (3, 3, rows, rows))
    low, high = (draw(st.none() | st.integers(-rows, rows)) for _ in range(2))
    if low is not None and high is not None:
        low, high = sorted((low, high))
    # the first query must reach the first key, and the last query the last one
    low = None if low is None else min(low, 0)
    high = None if high is None else max(high, queries - keys)
    padding = draw(st.sampled_from([None, 1, kv_heads]))
    shape = (draw(st.integers(1, 3)), kv_heads, group, queries, keys, draw(st.integers(1, 6)))
    return shape, low, high, padding, draw(st.integers(0, 2**31))


def widened(case):
    """Return the block with rows of whole vectors, as CUDA's operators need them."""
    (*shape, dim), *rest = case
    return (*shape, 8 * dim), *rest


def compare_block(kernel, case, dropout=0.0, value_dim=None, dtype=torch.float64, tolerance=1e-7, device="cpu"):
    (batch, kv_heads, group, queries, keys, dim), low, high, padding, seed = case
    generator = torch.Generator().manual_seed(seed)

    def rows(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).double()

    heads, value_dim = kv_heads * group, value_dim or dim
    q, k = rows(batch, heads, queries, dim), rows(batch, kv_heads, keys, dim)
    v, grad = rows(batch, kv_heads, keys, value_dim), rows(batch, heads, queries, value_dim)
    hidden = mask = None
    seen = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    distance = torch.arange(queries)[:, None] - torch.arange(keys)
    if low is not None:
        seen &= distance >= low
    if high is not None:
        seen &= distance <= high
    if padding:
        hidden = torch.rand(batch, padding, keys, generator=generator) < 0.4
        seen &= ~hidden.repeat_interleave(heads // padding, 1)[:, :, None]
    share = torch.ones_like(seen, dtype=torch.float64)
    if dropout:
        words = [
            torch.randint(-(2**31), 2**31, (batch, *n), generator=generator, dtype=torch.int32) | 1
            for n in ((heads, queries), (kv_heads, keys))
        ]
        mask = DropoutMask(Dropout(dropout, 0), *words)
        keeps = mask.dropout.keep_bits(words[0][..., None], words[1].repeat_interleave(group, 1)[:, :, None])
        share *= (keeps != 0) / (1 - dropout)
    scale = 0.4 * (4 / dim) ** 0.5
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    wide_k, wide_v = (x.repeat_interleave(group, 1) for x in leaves[1:])
    scores = (leaves[0] @ wide_k.mT * scale).exp() * seen
    empty = ~seen.any(-1)
    total = scores.sum(-1)
    weights = scores / total.masked_fill(empty, 1)[..., None] * share
    true_out, true_lse = weights @ wide_v, total.log()
    true = torch.autograd.grad(true_out, leaves, grad)

    # as a lattice reads them: heads side by side in a row, samples behind one another
    q, k, v, grad = (x.to(device, dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, grad))
    mask = mask and DropoutMask(mask.dropout, *(words.to(device) for words in mask[1:]))
    call = Call(Block(SOME, SOME, low, high), scale, None if hidden is None else hidden.to(device), mask)
    out, lse = kernel.forward(q, k, v, call)
    assert torch.equal((lse == -torch.inf).cpu(), empty)
    assert (out.cpu()[empty] == 0).all()
    close(out, true_out, tolerance)
    close(lse.cpu().masked_fill(empty, 0), true_lse.masked_fill(empty, 0), tolerance)
    gradients = kernel.backward(grad, q, k, v, out, lse.masked_fill(empty.to(device), torch.inf), call)
    for gradient, truth in zip(gradients, true, strict=True):
        close(gradient, truth, 4 * tolerance)


def close(actual, truth, tolerance):
    """Assert that shapes are equal, and values within `tolerance` of the largest true value."""
    assert actual.shape == truth.shape
    error = (actual.detach().cpu().double() - truth.detach()).abs().max().item()
    assert error <= tolerance * max(1, truth.abs().max().item())


def compare_attention(case, kernel, dtype, tolerance, device="cpu"):
    batch, length, heads, kv_heads, dim = case["shape"]
    tensors = drawn.tensors(case["shape"], case["layout"], dtype, case["seed"])
    ids = case["ids"]
    rows = ids if ids and isinstance(ids[0], list) else [ids] * batch
    tables = [brute.counts(case["shown"], case["multiplicity"], length, kv_heads, row) for row in rows]
    hidden, dropout = case["hidden"], case["dropout"] if kernel in ("eager", "reference") else 0.0
    if hidden is not None:
        tables = [brute.padded(table, row) for table, row in zip(tables, hidden, strict=True)]
    kept = None
    if dropout:
        count = len(case["shown"])
        kept = brute.kept(dropout, case["seed"], batch, heads, length, count, case["multiplicity"])
    scale = 0.7 / dim**0.5
    q, k, v, grad = (x.detach().to(device).requires_grad_(x.requires_grad) for x in tensors)
    with drawn.planned(*case["planned"]):
        out, lse = attend(
            q,
            k,
            v,
            drawn.pattern_of(case["shown"], case["multiplicity"]),
            documents=None if ids is None else torch.tensor(ids, device=device),
            key_padding_mask=None if hidden is None else torch.tensor(hidden, device=device),
            dropout=dropout,
            dropout_seed=case["seed"],
            scale=scale,
            mix=case["mix"],
            kernel=kernel,
            return_lse=True,
        )
        gradients = torch.autograd.grad(out, (q, k, v), grad)
    wide = [x.detach().double().requires_grad_() for x in tensors[:3]]
    true_out, true_lse = brute.attention(*wide, tables, scale, case["mix"], kept)
    true = torch.autograd.grad(true_out, wide, tensors[3].double())
    assert out.dtype == dtype
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    assert lse.shape == (batch, heads, length)
    empty = true_lse == -torch.inf
    assert torch.equal((lse == -torch.inf).cpu(), empty)
    assert (out.cpu().transpose(1, 2)[empty] == 0).all()
    lse, true_lse = lse.cpu().masked_fill(empty, 0), true_lse.masked_fill(empty, 0)
    for ours, truth in zip((out, lse, *gradients), (true_out, true_lse, *true), strict=True):
        close(ours, truth, tolerance)
