"""Squares and triangles hold each pair of a run once, and give the results of the plain equation."""

from itertools import product

import drawn
import pytest
import torch
from memory import peak_bytes
from tiers import tiered

from lightning_longnet import Pattern, attend
from lightning_longnet.attention.kernels import eager, squares
from lightning_longnet.attention.kernels.call import Call
from lightning_longnet.attention.plan.block import Block
from lightning_longnet.attention.plan.lattice import Lattice
from lightning_longnet.attention.plan.runs import Repeat

SOME = Lattice(range(1), rows=1, step=1, head=0, heads=1)  # a kernel is given its rows, and does not look
NO_REPEATS, REPEATS, ODD_REPEATS = (), (Repeat(2, 1, 0), Repeat(4, 3, 2)), (Repeat(3, 1, 2), Repeat(9, 4, 5))
LENGTHS = [(1, 1), (3, 3), (37, 37), (64, 64), (100, 100), (37, 21)]
SQUARES = list(product([None, 0], LENGTHS, [NO_REPEATS, REPEATS, ODD_REPEATS], [0.0, squares.BOUND]))


@pytest.fixture
def small(monkeypatch):
    """Make the squares small, so that a short run has many."""
    for name, value in (("SIDE", 4), ("MOST_ROWS", 16), ("LEAST_SCORES", 1), ("MOST_SCORES", 64)):
        monkeypatch.setattr(squares, name, value)
    squares._tiles.cache_clear()
    yield
    squares._tiles.cache_clear()


def rows(queries, keys, dtype=torch.float64, heads=4, kv_heads=2, width=8):
    """Return q, k, v and a gradient of a call, as strided views."""
    generator = torch.Generator().manual_seed(0)
    shapes = (queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads)
    drawn_rows = [torch.randn(2, n, h, width, generator=generator, dtype=torch.float64) for n, h in shapes]
    return [x.transpose(1, 2).to(dtype) for x in drawn_rows]


def both_ways(kernel, q, k, v, grad, call):
    out, lse = kernel.forward(q, k, v, call)
    # the softmax of the block is part of a larger one
    return out, lse, *kernel.backward(grad, q, k, v, 0.9 * out, lse + 0.1, call)


@pytest.mark.parametrize(("low", "lengths", "repeats", "bound"), tiered(SQUARES, quick=SQUARES[::5], covers=2))
@pytest.mark.usefixtures("small")
def test_results_are_those_of_tiles_of_rows(low, lengths, repeats, bound, monkeypatch):
    monkeypatch.setattr(squares, "BOUND", bound)
    q, k, v, grad = rows(*lengths)
    call = Call(Block(SOME, SOME, low, repeats=repeats), 0.4)
    assert squares.serves(q, k, call) == (low is None or lengths[0] == lengths[1])
    if squares.serves(q, k, call):
        truth = both_ways(eager, q, k, v, grad, call)
        assert torch.are_deterministic_algorithms_enabled(), "which fills uninitialized memory with NaN"
        torch.testing.assert_close(both_ways(squares, q, k, v, grad, call), truth)


@pytest.mark.usefixtures("small")
def test_heads_may_have_their_own_weights():
    q, k, v, grad = rows(50, 50)
    call = Call(Block(SOME, SOME, 0, head_repeats=(REPEATS, (Repeat(2, 0, 1), Repeat(4, 0, 1)))), 0.4)
    torch.testing.assert_close(both_ways(squares, q, k, v, grad, call), both_ways(eager, q, k, v, grad, call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
@pytest.mark.usefixtures("small")
def test_large_scores_overflow_no_sum(size, dtype):
    q, k, v, grad = rows(40, 40, dtype)
    # a later key, which no query of the first rows may see, and a row whose scores are all -inf in float32
    q[..., 0], k[..., 0], k[:, :, -1] = q[..., 0].abs() * size, -k[..., 0].abs(), size
    q[:, :, 3, 0], k[:, :, :4, 0] = size, -size
    call = Call(Block(SOME, SOME, 0), 1.0)
    result, truth = both_ways(squares, q, k, v, grad, call), both_ways(eager, q, k, v, grad, call)
    for ours, true in zip(result[:2], truth[:2], strict=True):
        torch.testing.assert_close(ours, true, equal_nan=True)
    if size < 1e30:
        assert all(x.isfinite().all() for x in result)
        for ours, true in zip(result[2:], truth[2:], strict=True):
            torch.testing.assert_close(ours, true, rtol=1e-3, atol=1e-4 * true.abs().max().item())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("every", [1, 3, 4, 16])
@pytest.mark.parametrize("length", [1, 4, 5, 31, 64, 77])
@pytest.mark.usefixtures("small")
def test_tiles_have_each_pair_once(length, every, is_causal):
    pairs, queries, keys = [], set(), set()
    for tile in squares._tiles(length, length, is_causal, 64, every):
        starts = [(tile.first_query + i * tile.step, tile.first_key + i * tile.step) for i in range(tile.many)]
        own_queries = {query + a for query, _ in starts for a in range(tile.queries)}
        own_keys = {key + b for _, key in starts for b in range(tile.keys)}
        assert tile.has_first_key == (not own_queries & queries)
        assert tile.has_first_query == (not own_keys & keys)
        queries, keys = queries | own_queries, keys | own_keys
        assert tile.many == 1 or tile.step % every == 0
        assert tile.scores <= 64 or (tile.is_triangle and tile.many == 1)
        for (query, key), a, b in product(starts, range(tile.queries), range(tile.keys)):
            if not tile.is_triangle or b <= a:
                pairs.append((query + a, key + b))
    assert sorted(pairs) == [(a, b) for a in range(length) for b in range(a + 1 if is_causal else length)]


def test_a_short_call_takes_less_memory_than_with_tiles_of_rows(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    q, k, v, grad = drawn.tensors((1, 2048, 8, 8, 64), dtype=torch.float32)
    pattern = Pattern.dilated((2048, 4096), (1, 2), is_causal=True)
    assert peak_bytes(lambda: attend(q, k, v, pattern, kernel="sdpa").backward(grad)) < 8 * q.numel() * 4
