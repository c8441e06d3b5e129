"""The plain products hold a tile of scores, never all of them, and round no half type in between."""

from itertools import product

import drawn
import pytest
import torch
from memory import peak_bytes
from tiers import tiered

from lightning_longnet import Pattern, attend


@pytest.mark.parametrize(
    ("pattern", "dropout"), tiered(product(["dense", "window"], [0.0, 0.1]), quick=[("dense", 0.1), ("window", 0.0)])
)
def test_memory_grows_with_the_tokens_not_with_the_pairs(pattern, dropout):
    shown, peaks = {"dense": Pattern.dense(), "window": Pattern.window(2000, True)}[pattern], []
    for length in (2048, 4096):
        q, k, v, grad = drawn.tensors((1, length, 2, 2, 8), dtype=torch.float32)
        peaks.append(peak_bytes(lambda: attend(q, k, v, shown, kernel="eager", dropout=dropout).backward(grad)))  # noqa: B023
    assert peaks[1] < 24 * 2**20 < 2 * 4096**2 * 4  # all scores once would be 128 MiB
    assert peaks[1] < 1.6 * peaks[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_summed_in_float32(dtype):
    q, k, v, grad = drawn.tensors((1, 600, 2, 1, 16), dtype=dtype)
    pattern = Pattern.dilated((200, 600), (1, 2), is_causal=True)
    out = attend(q, k, v, pattern, kernel="eager", dropout=0.2, dropout_seed=3)
    result = (out, *torch.autograd.grad(out, (q, k, v), grad))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = attend(*wide, pattern, kernel="reference", dropout=0.2, dropout_seed=3)
    truth = (truth, *torch.autograd.grad(truth, wide, grad.double()))
    for ours, true in zip(result, truth, strict=True):
        assert ours.dtype == dtype
        # one rounding of the result, and one of out, which the gradient reads
        assert (ours.double() - true).norm() <= 1.5 * torch.finfo(dtype).eps * true.norm()


def test_a_short_call_takes_the_memory_of_its_pairs():
    q, k, v, grad = drawn.tensors((1, 8, 2, 2, 8), dtype=torch.float32)
    assert peak_bytes(lambda: attend(q, k, v, Pattern.dense(), kernel="eager").backward(grad)) < 2**15
