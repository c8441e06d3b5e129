"""The pitfalls of torch's CPU operator: that they are there, and that the kernel stays clear of them."""

from unittest.mock import patch

import pytest
import torch

from lightning_longnet.attention.kernels import eager, squares
from lightning_longnet.attention.kernels.call import Call
from lightning_longnet.attention.kernels.sdpa import cpu as sdpa
from lightning_longnet.attention.plan.block import Block
from lightning_longnet.attention.plan.lattice import Lattice
from lightning_longnet.attention.plan.runs import Repeat

SOME = Lattice(range(1), rows=1, step=1, head=0, heads=1)  # a kernel is given its rows, and does not look
FULL, CAUSAL = Block(SOME, SOME), Block(SOME, SOME, low=0)


def blocks(queries=6, keys=6, heads=4, kv_heads=2, dim=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(3, h, n, dim, generator=generator, dtype=torch.float64).to(dtype)
        for h, n in ((heads, queries), (kv_heads, keys), (kv_heads, keys), (heads, queries))
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_faster", [False, True])
def test_half_types_are_computed_in_whichever_is_faster(dtype, is_faster, monkeypatch):
    monkeypatch.setattr(sdpa, "_half_is_faster", lambda _: is_faster)
    q, k, v, grad = blocks(dtype=dtype)
    truth = sdpa.forward(q.float(), k.float(), v.float(), Call(CAUSAL, 0.4))
    out, lse = sdpa.forward(q, k, v, Call(CAUSAL, 0.4))
    assert (out.dtype, lse.dtype) == (dtype if is_faster else torch.float32, torch.float32)
    torch.testing.assert_close(out.float(), truth[0], rtol=0, atol=4 * torch.finfo(dtype).eps if is_faster else 0)
    grads = sdpa.backward(grad, q, k, v, out.to(dtype), lse, Call(CAUSAL, 0.4))
    true_grads = sdpa.backward(grad.float(), q.float(), k.float(), v.float(), *truth, Call(CAUSAL, 0.4))
    for result, true in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(result.float(), true, rtol=0, atol=32 * torch.finfo(dtype).eps)


def test_the_faster_of_two_types_is_measured():
    assert sdpa._half_is_faster(torch.bfloat16) in (True, False)
    assert sdpa._half_is_faster.cache_info().currsize > 0


@pytest.mark.parametrize("tiles", [None, eager, squares])
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("low", [None, 0])
def test_pairs_that_count_more_than_once_get_the_log_as_a_bias(low, is_shared, tiles, monkeypatch):
    """Tiles of four queries hold whole periods of the weights, the rest of a block does not."""
    if tiles:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        monkeypatch.setattr(squares, "serves", lambda *_: tiles is squares)
        monkeypatch.setattr(sdpa, "LEAST_TILED", 0)
        monkeypatch.setattr(sdpa, "TILED_ROWS", 0)
        monkeypatch.setattr(sdpa, "LEAST_SQUARED", 0)
        monkeypatch.setattr(sdpa, "_tiles_are_fast", lambda: True)
        monkeypatch.setattr(eager, "_ROWS", 4)
        monkeypatch.setitem(eager._TILE, "cpu", 1)
    q, k, v, grad = blocks(queries=10, keys=14 if low is None else 10)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    own = (Repeat(2, 1, 0), Repeat(4, 3, 2))
    repeats = own, own if is_shared else (Repeat(2, 0, 0), Repeat(4, 2, 0))
    a, b = torch.arange(10)[:, None], torch.arange(k.shape[2])
    counts = torch.ones(2, 10, k.shape[2], dtype=torch.float64)
    for count, of_head in zip(counts, repeats, strict=True):
        for every, query, key in of_head:
            count += (a % every == query) & (b % every == key)
    if low == 0:
        counts = counts.tril()
    counts = counts.repeat_interleave(2, 0)
    weights = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.4).exp() * counts
    truth = weights / weights.sum(-1, keepdim=True) @ v.repeat_interleave(2, 1)
    block = Block(SOME, SOME, low, repeats=own) if is_shared else Block(SOME, SOME, low, head_repeats=repeats)
    with patch.object(tiles or eager, "forward", wraps=(tiles or eager).forward) as plain:
        out, lse = sdpa.forward(q.detach(), k.detach(), v.detach(), Call(block, 0.4))
    assert plain.called == (tiles is not None)
    torch.testing.assert_close((out, lse), (truth, weights.sum(-1).log()))
    result = sdpa.backward(grad, q.detach(), k.detach(), v.detach(), out, lse, Call(block, 0.4))
    torch.testing.assert_close(result, torch.autograd.grad(truth, (q, k, v), grad))


@pytest.mark.parametrize("are_fast", [False, True])
def test_tiles_compute_short_causal_blocks_and_those_with_weights(are_fast, monkeypatch):
    monkeypatch.setattr(sdpa, "_tiles_are_fast", lambda: are_fast)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    repeats = (Repeat(2, 0, 0),)

    def is_tiled(rows, block, dtype=torch.float32):
        x = torch.empty(1, 1, dtype=dtype).expand(1, 8, rows, 16)
        return sdpa._is_tiled(x, x, Call(block, 1.0))

    assert all(is_tiled(rows, CAUSAL) for rows in (320, 767))
    assert not any(is_tiled(rows, CAUSAL) for rows in (128, 319, 768, 4096))
    assert not is_tiled(512, FULL)
    assert not is_tiled(512, CAUSAL, torch.bfloat16)
    assert not is_tiled(512, Block(SOME, SOME, low=0, high=9))
    assert is_tiled(2048, Block(SOME, SOME, low=0, repeats=repeats))
    assert not is_tiled(319, Block(SOME, SOME, low=0, repeats=repeats))
    assert is_tiled(2048, Block(SOME, SOME, repeats=repeats)) == are_fast
    assert is_tiled(512, Block(SOME, SOME, head_repeats=(repeats,) * 8)) == are_fast
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not is_tiled(512, CAUSAL)


def test_an_empty_block_is_stopped_before_it_kills_the_process():
    q, k, v, _ = blocks()
    with pytest.raises(AssertionError, match="an empty dimension kills the process"):
        sdpa.forward(q[:, :, :0], k, v, Call(FULL, 1.0))


def test_the_operator_wants_no_key_said_as_plus_infinity():
    """exp(S - lse) must be 0 for a query that has no key in the whole softmax."""
    q, k, v, grad = blocks()
    out, lse = sdpa.forward(q, k, v, Call(FULL, 0.4))
    lse = torch.full_like(lse, torch.inf)
    assert all((x == 0).all() for x in sdpa.backward(grad, q, k, v, out, lse, Call(FULL, 0.4)))


def test_the_operator_refuses_boolean_masks_and_dropout_and_calls_an_unseen_row_zero():
    """Why masks are floats here, dropout is not asked of it, and emptiness is judged by counting keys."""
    q, k, v, _ = blocks(kv_heads=4)
    hidden = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    with pytest.raises(RuntimeError):
        sdpa._forward(q, k, v, 0.0, False, attn_mask=hidden)
    with pytest.raises(RuntimeError):
        sdpa._forward(q, k, v, 0.5, False)
    nothing = torch.full((1, 1, 6, 6), -torch.inf, dtype=torch.float64)
    out, lse = sdpa._forward(q, k, v, 0.0, False, attn_mask=nothing)
    assert (out == 0).all()
    assert (lse == 0).all()
