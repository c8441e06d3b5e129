"""attend against the brute force: forward, lse and gradients, over drawn shapes, patterns, documents and layouts."""

import drawn
import pytest
import torch
from compared import compare_attention
from hypothesis import given, settings

KERNELS = ["sdpa", "eager", "reference"]


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=160, deadline=None)
@given(case=drawn.cases())
def test_equals_brute_force_in_float64(kernel, case):
    compare_attention(case, kernel, torch.float64, 1e-10)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@settings(max_examples=60, deadline=None)
@given(case=drawn.cases())
def test_equals_brute_force_in_float32(kernel, case):
    compare_attention(case, kernel, torch.float32, 1e-5)


@pytest.mark.full
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@settings(max_examples=1500, deadline=None)
@given(case=drawn.cases())
def test_equals_brute_force_in_float64_over_many_cases(kernel, case):
    compare_attention(case, kernel, torch.float64, 1e-10)
