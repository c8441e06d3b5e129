"""Linear maps in the faster library of a CPU: the results and gradients of `F.linear`, and when they are chosen."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_longnet import FeedForward
from lightning_longnet.layers import linear
from lightning_longnet.layers.linear import product, projected
from lightning_longnet.layers.loss import chunked_cross_entropy


@pytest.fixture
def routed(monkeypatch):
    """A CPU on which MKL is slow; the list holds the precision that each product of linear.py and loss.py ran at."""
    from lightning_longnet.attention.kernels import products

    monkeypatch.setattr(products, "_cpu_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(products, "_is_exact", lambda: True)
    products.uses_onednn.cache_clear()
    chosen = []

    def recording(*args):
        chosen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return F.linear(*args)

    monkeypatch.setattr(linear, "F", type("F", (), {"linear": staticmethod(recording)}))
    yield chosen
    products.uses_onednn.cache_clear()


def leaves(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (2, 2, 5, 3), (1, 3), (2, 0, 3)])
def test_results_and_derivatives_are_those_of_linear(shape, has_bias):
    inputs = leaves(shape, (4, 3), *([(4,)] if has_bias else []), dtype=torch.float64)

    def ours(x, weight, bias=None):
        return linear._Product.apply(x, weight, bias)

    out, truth = ours(*inputs), F.linear(*inputs)
    torch.testing.assert_close(out, truth)
    grad = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(truth, inputs, grad))
    torch.autograd.gradcheck(ours, inputs, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(ours, inputs)


def test_functional_transforms_see_a_linear_map():
    x, weight, bias = leaves((6, 5, 3), (4, 3), (4,), dtype=torch.float64)

    def loss(call, weight, row):
        return call(row, weight, bias).square().sum()

    found, truth = (
        torch.func.vmap(torch.func.grad(partial(loss, call)), in_dims=(None, 0))(weight, x)
        for call in (linear._Product.apply, F.linear)
    )
    torch.testing.assert_close(found, truth)


def test_what_needs_no_gradient_is_not_held(routed):
    for needs_x, needs_weight, held in ((True, True, 2), (True, False, 1), (False, True, 1)):
        x, weight = leaves((512, 128), (128, 128))
        x.requires_grad_(needs_x)
        weight.requires_grad_(needs_weight)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            out = product(x, weight, None)
        assert out.grad_fn.name() == "_ProductBackward"
        assert len(saved) == held
        out.sum().backward()
        assert [x.grad is not None, weight.grad is not None] == [needs_x, needs_weight]


def test_large_float32_products_alone_are_routed(routed):
    x, weight = leaves((512, 128), (128, 128))
    for dtype, rows, expected in (
        (torch.float32, 512, "bf16"),
        (torch.float32, 100, "none"),
        (torch.float64, 512, "none"),
        (torch.bfloat16, 512, "none"),
    ):
        product(x[:rows].to(dtype), weight.to(dtype), None)
        assert routed.pop() == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x, weight, None).dtype == torch.bfloat16
    assert routed.pop() == "none"
    product(leaves((2048,))[0], leaves((2048, 2048))[0], None)
    assert routed.pop() == "none"
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_a_module_that_does_more_than_a_linear_map_is_called(routed):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(512, 128)
    plain, scaled = nn.Linear(128, 128), Scaled(128, 128)
    torch.testing.assert_close(projected(plain, x), plain(x))
    assert routed == ["bf16"]
    torch.testing.assert_close(projected(scaled, x), scaled(x))
    truth = plain(x)
    handles = plain.register_forward_hook(lambda *_: truth + 1), plain.register_forward_pre_hook(lambda *_: None)
    for handle in handles:
        torch.testing.assert_close(projected(plain, x), plain(x))
        handle.remove()
    plain.forward = lambda x: truth + 2  # as accelerate does
    torch.testing.assert_close(projected(plain, x), truth + 2)
    assert routed == ["bf16"]


def test_a_feed_forward_and_a_loss_are_routed_forward_and_backward(routed, monkeypatch):
    """The gradients are products of tensors: what the setting is at each of them is seen by a dispatch mode."""
    from torch.utils._python_dispatch import TorchDispatchMode

    chosen = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                chosen.setdefault(torch.backends.mkldnn.matmul.fp32_precision, []).append(operator)
            return operator(*args, **(kwargs or {}))

    torch.manual_seed(0)
    layer, x = FeedForward(128), torch.randn(2, 300, 128)
    with Watch():
        layer(x).sum().backward()
        hidden, weight = leaves((600, 128), (256, 128))
        chunked_cross_entropy(hidden, weight, torch.zeros(600, dtype=torch.long)).loss_sum.backward()
    assert list(chosen) == ["bf16"]
    assert len(chosen["bf16"]) == 5 + 3  # the input has no gradient


@pytest.mark.usefixtures("routed")
@pytest.mark.parametrize("shape", [(2, 300, 128), (600, 128)])
def test_results_may_be_changed_in_place(shape):
    x, biased = torch.randn(shape), nn.Linear(128, 512)
    once, twice = projected(biased, x), projected(biased, x)
    twice += once
    torch.testing.assert_close(twice, 2 * once)
    parameters = [biased.weight, biased.bias]
    truth = torch.autograd.grad(2 * F.linear(x, *parameters).mean(), parameters)
    torch.testing.assert_close(torch.autograd.grad(twice.mean(), parameters), truth)


@pytest.mark.usefixtures("routed")
def test_a_forward_that_replaces_that_of_all_linear_layers_is_called(monkeypatch):
    seen = []
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: seen.append(self) or F.linear(x, self.weight, self.bias))
    projected(nn.Linear(512, 512), torch.randn(64, 512))
    assert len(seen) == 1
