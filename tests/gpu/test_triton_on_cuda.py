"""The kernel "triton" on this CUDA device: drawn cases, whole tiles of each width, and equal bits."""

import drawn
import pytest
import torch
from compared import close, compare_attention
from hypothesis import given, settings

from lightning_longnet import Pattern, attend

pytestmark = pytest.mark.gpu

# of the largest true value
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
LONGNET = Pattern.dilated((256, 512, 1024), (1, 2, 4), is_causal=True)
PATTERNS = {
    "longnet": LONGNET,
    "not causal": Pattern.dilated((256, 512, 1024), (1, 2, 4)),
    "set": Pattern.dilated((100, 300, 700), (1, 3, 5), True, multiplicity="set"),
    "window": Pattern.window(300, True) + Pattern.dilated((1024,), (4,), True),
}


def compare(widths, dtype, pattern):
    """Compare with the reference in float64, at 1,500 tokens and four query heads for two key heads."""
    width, value_width = widths
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, width), (2, width), (2, value_width), (4, value_width))
    tensors = [torch.randn(1, 1500, *shape, generator=generator).to(dtype) for shape in shapes]
    results = []
    for kernel, cast in (("triton", dtype), ("reference", torch.float64)):
        q, k, v, grad = (x.to("cuda", cast) for x in tensors)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = attend(*leaves, pattern, kernel=kernel, return_lse=True)
        results.append((out, lse.nan_to_num(neginf=0), *torch.autograd.grad(out, leaves, grad)))
    for result, truth in zip(*results, strict=True):
        close(result, truth.cpu(), TOLERANCE[dtype])


@DTYPES
@settings(max_examples=60, deadline=None)
@given(case=drawn.cases())
def test_equals_brute_force(dtype, case):
    compare_attention(case, "triton", dtype, TOLERANCE[dtype], device="cuda")


@DTYPES
@pytest.mark.parametrize("widths", [(32, 32), (64, 64), (96, 96), (128, 128), (256, 256), (64, 128)])
def test_widths(dtype, widths):
    compare(widths, dtype, LONGNET)


@DTYPES
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_patterns(dtype, pattern):
    compare((64, 64), dtype, pattern)


def test_the_same_bits_every_time():
    q, k, v, grad = (x.detach().cuda() for x in drawn.tensors((2, 3000, 4, 2, 64), dtype=torch.bfloat16))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for _ in range(2):
        out = attend(*leaves, LONGNET, kernel="triton")
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    assert all(map(torch.equal, *results))
