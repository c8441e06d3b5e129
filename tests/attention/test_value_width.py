"""Values of another width than queries and keys, as in latent attention: parts give what one process gives."""

from itertools import product

import pytest
import torch
from tiers import tiered

from lightning_longnet import Pattern, SequenceShard, attend

PATTERNS = {
    "dense": Pattern.dense(is_causal=True),
    "longnet": Pattern.dilated((8, 16, 64), (1, 2, 4), is_causal=True),
    "window": Pattern.window(7, is_causal=True),
}
LENGTHS = (14, 13)


def tensors(value_dim):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 27, 4, 8), (2, 27, 2, 8), (2, 27, 2, value_dim), (2, 27, 4, value_dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def step(q, k, v, grad, pattern, **options):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, pattern, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def split(group, value_dim, name, exchange, placement):
    shard = SequenceShard(group, LENGTHS[group.rank()], placement)
    rows = shard.tokens()
    parts = [x[:, rows] for x in tensors(value_dim)]
    return rows, *step(*parts, PATTERNS[name], shard=shard, exchange=exchange)


CASES = list(product((6, 12), PATTERNS, ("gather", "ring", "swap"), ("contiguous", "zigzag")))
QUICK = [(6, "dense", "gather", "zigzag"), (12, "longnet", "ring", "contiguous"), (6, "window", "swap", "zigzag")]


@pytest.mark.parametrize(("value_dim", "name", "exchange", "placement"), tiered(CASES, QUICK))
def test_parts_give_what_one_process_gives(pool, value_dim, name, exchange, placement):
    expected = step(*tensors(value_dim), PATTERNS[name], kernel="reference")
    assert expected[0].shape == (2, 27, 4, value_dim)
    for rows, *result in pool.run(2, split, value_dim, name, exchange, placement):
        for ours, whole in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, whole[:, rows], rtol=0, atol=1e-12)


def test_a_kernel_that_needs_equal_widths_says_so():
    q, k, v, _ = tensors(6)
    with pytest.raises(ValueError, match="needs v as wide as q and k, got 6 and 8"):
        attend(q, k, v, PATTERNS["dense"], kernel="sdpa")
