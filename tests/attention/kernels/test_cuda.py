"""CUDA's kernels on operators that are emulated: what they are called with, and what is made of what they give."""

import sys

import emulated
import pytest
import torch
from compared import SOME, calls, close, compare_attention, compare_block, widened
from drawn import cases
from hypothesis import given, settings

from lightning_longnet import Pattern, attend, explain
from lightning_longnet.attention.kernels import cudnn, flash, fused, rows, sdpa
from lightning_longnet.attention.kernels.call import Call
from lightning_longnet.attention.kernels.sdpa import efficient
from lightning_longnet.attention.plan.block import Block
from lightning_longnet.attention.plan.runs import Repeat

HALF, FLOAT = fused.HALF, (torch.float32,)


@pytest.mark.parametrize("kernel", [flash, sdpa, cudnn], ids=lambda kernel: kernel.name)
@settings(max_examples=100, deadline=None)
@given(case=calls())
def test_every_block(kernel, case):
    shape, low, high, padding, seed = widened(case)
    case = shape, low, high, None if kernel is flash else padding, seed
    with emulated.device(half=FLOAT):
        compare_block(kernel, case, dtype=torch.float32, tolerance=1e-5)


@settings(max_examples=60, deadline=None)
@given(case=calls())
def test_every_block_in_float32_or_on_an_old_device(case):
    with emulated.device():
        compare_block(sdpa, widened(case), dtype=torch.float32, tolerance=1e-5)
        assert set(emulated.calls) == {
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_efficient_attention_backward",
        }
    with emulated.device(capability=(7, 5)):
        compare_block(sdpa, widened(case), dtype=torch.float16, tolerance=5e-3)
        assert "_flash_attention_forward" not in emulated.calls


@pytest.mark.parametrize("kernel", [flash, sdpa, cudnn], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", HALF)
@settings(max_examples=15, deadline=None)
@given(case=calls())
def test_every_block_in_half_types(kernel, dtype, case):
    shape, low, high, padding, seed = widened(case)
    case = shape, low, high, None if kernel is flash else padding, seed
    with emulated.device():
        compare_block(kernel, case, dtype=dtype, tolerance=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kernel", ["flash", "sdpa", "cudnn"])
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_equals_brute_force(kernel, case):
    with emulated.device(half=FLOAT):
        compare_attention(served(kernel, case), kernel, torch.float32, 1e-5)


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_equals_brute_force_in_float32(case):
    with emulated.device():
        compare_attention(served("sdpa", case), "sdpa", torch.float32, 1e-5)


@pytest.mark.parametrize("kernel", ["flash", "sdpa", "cudnn"])
@settings(max_examples=10, deadline=None)
@given(case=cases())
def test_equals_brute_force_in_bfloat16(kernel, case):
    with emulated.device():
        compare_attention(served(kernel, case), kernel, torch.bfloat16, 0.1)


def served(kernel, case):
    *shape, dim = case["shape"]
    return case | {"shape": (*shape, 8 * dim), "hidden": None if kernel == "flash" else case["hidden"]}


@pytest.mark.parametrize("kernel", [flash, sdpa, cudnn], ids=lambda kernel: kernel.name)
def test_more_batches_than_a_grid_holds_take_several_calls(monkeypatch, kernel):
    for module in (rows, efficient):
        monkeypatch.setattr(module, "BATCHES", 2)
    monkeypatch.setattr(rows.over_batches, "__kwdefaults__", {"limit": 2})
    for padding in (None, 2):
        with emulated.device(half=FLOAT):
            case = (5, 2, 2, 6, 6, 8), 0, None, None if kernel is flash else padding, 0
            compare_block(kernel, case, dtype=torch.float32, tolerance=1e-5)
            assert len(emulated.calls) == 6 + (kernel is cudnn and padding is None)  # which asks once for a shape


def test_a_bias_of_each_batch_is_bounded(monkeypatch):
    monkeypatch.setattr(efficient, "_BIAS", 100)
    with emulated.device():
        compare_block(sdpa, ((3, 2, 1, 6, 6, 8), -1, 2, 2, 0), dtype=torch.float32, tolerance=1e-5)
        assert len(emulated.calls) == 6


@pytest.mark.parametrize("low", [None, 0])
def test_weights_are_served_in_float32(low):
    q, k, v, grad = (torch.randn(2, heads, 6, 8) for heads in (4, 2, 2, 4))
    call = Call(Block(SOME, SOME, low, repeats=(Repeat(2, 1, 0), Repeat(4, 3, 2))), 0.4)
    truth = sdpa.forward(q, k, v, call)
    true = sdpa.backward(grad, q, k, v, *truth, call)
    with emulated.device():
        result = sdpa.forward(q, k, v, call)
        grads = sdpa.backward(grad, q, k, v, *truth, call)
    for a, b in zip((*result, *grads), (*truth, *true), strict=True):
        close(a, b, 1e-5)


def test_misaligned_rows_are_copied():
    base = torch.randn(2, 9, 4, 12)
    q = base[:, 1:, :, 2:10].requires_grad_()  # a head 8 bytes off
    pattern = Pattern.dilated((4, 8), (1, 2), True) + Pattern.window(3, True)

    def result(**settings):
        out = attend(q, q, q, pattern, **settings)
        return out, *torch.autograd.grad(out, q, base[:, 1:, :, 3:11].detach())

    truth = result()
    for kernel in ("flash", "sdpa", "cudnn"):
        with emulated.device(half=FLOAT):
            for ours, true in zip(result(kernel=kernel), truth, strict=True):
                close(ours, true, 1e-5)


def test_rows_alone_in_their_dimension_are_aligned_too():
    x = torch.empty_strided((1, 1, 3, 8), (7, 5, 8, 1)).fill_(1)
    assert rows.as_aligned(x).stride()[:3] == (24, 24, 8)
    aligned = torch.ones(2, 3, 4, 8).transpose(1, 2)
    assert rows.as_aligned(aligned) is aligned


def test_a_gradient_that_is_the_same_everywhere():
    q = torch.randn(1, 12, 2, 8, requires_grad=True)
    (truth,) = torch.autograd.grad(attend(q, q, q, Pattern.dense(True)).sum(), q)
    for kernel in ("flash", "sdpa", "cudnn"):
        with emulated.device(half=FLOAT):
            (result,) = torch.autograd.grad(attend(q, q, q, Pattern.dense(True), kernel=kernel).sum(), q)
            close(result, truth, 1e-5)


def explained(dtype, capability=(9, 0), **settings):
    q = torch.zeros(1, 8, 2, settings.pop("dim", 64), dtype=dtype)
    with emulated.device(capability):
        return explain(q, q, q, Pattern.dense(), **settings)


def test_which_kernel_runs_on_cuda():
    padding = torch.zeros(1, 8, dtype=torch.bool)
    assert explained(torch.bfloat16).chosen == "flash"
    assert explained(torch.bfloat16, key_padding_mask=padding).chosen == "sdpa"
    assert explained(torch.bfloat16, dim=512).chosen == "sdpa"
    assert explained(torch.bfloat16, dropout=0.1).chosen == "eager"
    assert explained(torch.bfloat16, dim=36).chosen == "eager"
    assert explained(torch.float16, (7, 5)).chosen == "sdpa"
    assert explained(torch.float32).chosen == "sdpa"
    assert explained(torch.float64).chosen == "eager"
    assert explained(torch.bfloat16, kernel="cudnn").chosen == "cudnn"


def test_explain_on_cuda_is_a_table():
    head, *rows = str(explained(torch.bfloat16)).splitlines()
    assert head == "cuda of compute capability 9.0, bfloat16, accumulates in float32"
    assert [row.split()[:2] for row in rows[:3]] == [["flash", "runs"], ["sdpa", "could"], ["cudnn", "could"]]
    assert rows[1].endswith("torch's attention for CUDA: flash, else memory-efficient")
    assert str(explained(torch.float32)).splitlines()[2].endswith("torch's attention for CUDA: memory-efficient")
    assert "serves bfloat16 and float16, q is torch.float32" in str(explained(torch.float32))
    assert "needs compute capability 8.0, got 7.5" in str(explained(torch.float16, (7, 5)))
    assert "go where sdpa sends them" in str(
        explained(torch.float16, key_padding_mask=torch.zeros(1, 8, dtype=torch.bool))
    )


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("is_installed", [False, True])
def test_the_choice_of_a_kernel_is_compiled_without_a_break(monkeypatch, is_installed):
    pattern = Pattern.dilated((4, 8), (1, 2), True)

    def call(x):
        return attend(x, x, x, pattern) * 2

    x = torch.randn(1, 20, 2, 8, dtype=torch.bfloat16)
    with emulated.device():
        monkeypatch.setattr(emulated.prepared, "_capability", torch.compiler.assume_constant_result(lambda _: (9, 0)))
        if not is_installed:
            monkeypatch.setitem(sys.modules, "flash_attn", None)
        result = torch.compile(call, backend="aot_eager", fullgraph=True)(x)
        close(result, call(x), 1e-6)
        assert ("package forward" in emulated.calls) == is_installed
    torch.compiler.reset()
