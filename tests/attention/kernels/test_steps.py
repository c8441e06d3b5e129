"""Steps of parts: the results of the loop over blocks, without what that looks up in each call."""

import gc
from itertools import product
from unittest.mock import patch

import pytest
import torch

from lightning_longnet import Pattern, attend
from lightning_longnet.attention.kernels import blocks, steps
from lightning_longnet.attention.kernels.partial import Partial
from lightning_longnet.attention.parallel import calls
from lightning_longnet.attention.plan.block import Block
from lightning_longnet.attention.plan.blocks import plan
from lightning_longnet.attention.plan.lattice import Lattice

LONGNET = Pattern.dilated((16, 32, 64), (1, 2, 4), is_causal=True)
PATTERNS = {
    "dense": Pattern.dense(is_causal=True),
    "LongNet": LONGNET,
    "once": Pattern(LONGNET.branches, "set"),
    "windows": Pattern.window(7) + Pattern.dilated((24,), (3,)),
}


def tensors(batch=1, length=64, heads=4, kv_heads=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, length, count, 8) for count in (heads, kv_heads, kv_heads))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def results(inputs, pattern, **options):
    out, lse = attend(*inputs, pattern, return_lse=True, **options)
    return out, lse, *torch.autograd.grad(out, inputs, torch.ones_like(out))


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("shape", [{}, {"batch": 3}, {"length": 50}, {"kv_heads": 2}, {"dtype": torch.bfloat16}])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_results_are_those_of_the_loop_over_blocks(pattern, shape, kernel):
    inputs = tensors(**shape)
    found = results(inputs, pattern, kernel=kernel)
    with patch.multiple(blocks, forward_steps=lambda *_: None, backward_steps=lambda *_: None):
        expected = results(inputs, pattern, kernel=kernel)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (1, 0, 2, 3), (2, 0, 1, 3)])
def test_tensors_of_any_layout(order):
    """The views of one layout serve no other one."""
    inputs = tensors(2)
    expected = results(inputs, LONGNET)
    moved = [x.detach().permute(order).contiguous() for x in inputs]
    back = [order.index(dim) for dim in range(4)]
    leaves = [x.permute(back).requires_grad_() for x in moved]
    assert not leaves[0].is_contiguous()
    torch.testing.assert_close(results(leaves, LONGNET), expected)


def test_parts_keep_the_steps_of_some_layouts():
    plan.cache_clear()
    for batch in range(1, 2 * steps.MOST_LAYOUTS + 2):
        attend(*tensors(batch), LONGNET)
    (parts,) = {id(kept.call.route.own): kept.call.route.own for kept in calls._PLAIN_CALLS.values()}.values()
    kept = [vars(cut)["_steps"] for cut in vars(parts)["_cuts"].values()]
    assert all(0 < len(layouts) <= steps.MOST_LAYOUTS for layouts in kept)


def test_a_call_lives_no_longer_than_its_plan():
    plan.cache_clear()
    gc.collect()
    results(tensors(), LONGNET)
    assert len(calls._PLAIN_CALLS) == 2
    plan.cache_clear()
    gc.collect()
    assert not calls._PLAIN_CALLS


def test_a_plan_keeps_some_calls(monkeypatch):
    """A scale that changes in each step makes a call of each step."""
    monkeypatch.setattr(calls, "MOST_CALLS", 3)
    plan.cache_clear()
    gc.collect()
    for step in range(8):
        attend(*tensors(), LONGNET, scale=1 + step / 10)
        assert len(calls._PLAIN_CALLS) <= 3


def test_batches_of_any_size_have_one_cut_of_own_keys():
    plan.cache_clear()
    for batch in range(1, 5):
        attend(*tensors(batch, length=256), LONGNET)
    (parts,) = {id(kept.call.route.own): kept.call.route.own for kept in calls._PLAIN_CALLS.values()}.values()
    assert len(vars(parts)["_cuts"]) == 1


def test_which_blocks_show_each_query_a_key():
    bounds = [None, *range(-4, 5)]
    for queries, keys, low, high in product(range(1, 5), range(1, 5), bounds, bounds):
        block = Block(*(Lattice(range(1), rows, 1, 0, 1) for rows in (queries, keys)), low, high)
        distances = [[a - b for b in range(keys)] for a in range(queries)]
        shown = [
            [(low is None or d >= low) and (high is None or d <= high) for d in of_query] for of_query in distances
        ]
        assert not block.has_keys or all(map(any, shown)), block
        if high is None:
            assert block.has_keys == all(map(any, shown)), block


def test_a_partial_with_keys_needs_no_mask():
    generator = torch.Generator().manual_seed(0)
    out, more = torch.randn(2, 5, 8, generator=generator)
    lse, more_lse = torch.randn(2, 5, 1, generator=generator)
    lse[2], out[2] = -torch.inf, 0  # no key yet
    first, second = Partial(out.clone(), lse.clone()), Partial(out.clone(), lse.clone())
    first.add_(more, more_lse)
    second.add_(more, more_lse, has_keys=True)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
