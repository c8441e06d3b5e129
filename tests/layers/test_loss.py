"""Chunked cross entropy against torch's own, and what it holds."""

import pytest
import torch
import torch.nn.functional as F

from lightning_longnet.layers.loss import chunked_cross_entropy


def drawn(tokens=(2, 37), width=8, vocabulary=50, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(*tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    bias = torch.randn(vocabulary, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocabulary, tokens).masked_fill(torch.rand(tokens) < 0.3, -100)
    return hidden, weight, bias, labels


def plain(hidden, weight, bias, labels):
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    return F.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, labels.flatten(), reduction="sum")


@pytest.mark.parametrize("chunk_tokens", [1, 10, 74, 1000])
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_torchs_own_gradients_included(chunk_tokens, has_bias):
    hidden, weight, bias, labels = drawn()
    leaves = [hidden, weight, *([bias] if has_bias else [])]
    used_bias = bias if has_bias else None
    loss, count = chunked_cross_entropy(hidden, weight, labels, used_bias, chunk_tokens=chunk_tokens)
    expected = plain(hidden, weight, used_bias, labels)
    torch.testing.assert_close(loss, expected)
    assert count == (labels != -100).sum()
    torch.testing.assert_close(torch.autograd.grad(loss * 3, leaves), torch.autograd.grad(expected * 3, leaves))


@pytest.mark.parametrize("frozen", range(3))
def test_what_is_frozen_gets_no_gradient(frozen):
    hidden, weight, bias, labels = drawn()
    inputs = [hidden, weight, bias]
    inputs[frozen].requires_grad_(False)
    loss, _ = chunked_cross_entropy(hidden, weight, labels, bias)
    loss.backward()
    expected = torch.autograd.grad(plain(hidden, weight, bias, labels), [x for x in inputs if x.requires_grad])
    torch.testing.assert_close([x.grad for x in inputs if x.requires_grad], list(expected))
    assert inputs[frozen].grad is None


def test_no_token_and_no_label():
    hidden, weight, bias, _ = drawn((0,))
    loss, count = chunked_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long), bias)
    assert (loss.item(), count.item()) == (0.0, 0)
    loss.backward()
    assert not weight.grad.any()
    hidden, weight, bias, labels = drawn()
    loss, count = chunked_cross_entropy(hidden, weight, torch.full_like(labels, -100), bias)
    loss.backward()
    assert (loss.item(), count.item()) == (0.0, 0)
    assert not hidden.grad.any()


def test_autocast_computes_logits_in_half_and_sums_in_full():
    hidden, weight, bias, labels = drawn((4, 300), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = chunked_cross_entropy(hidden, weight, labels, bias)
        expected = F.cross_entropy(
            F.linear(hidden, weight).float().add(bias).flatten(0, 1), labels.flatten(), reduction="sum"
        )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-3)
    (dweight,) = torch.autograd.grad(loss, weight)
    (best,) = torch.autograd.grad(plain(hidden, weight, bias, labels), weight)
    assert (dweight - best).norm() < 0.02 * best.norm()


def test_logits_of_all_tokens_are_never_held():
    hidden, weight, bias, labels = drawn((1, 4096), width=16, vocabulary=1000, dtype=torch.float32)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(x))
            return out

    with Watch():
        loss, _ = chunked_cross_entropy(hidden, weight, labels, bias, chunk_tokens=64)
        loss.backward()
    assert max(largest) <= 64 * 1000 + 4096 * 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w, y: (h, w, y[:, 1:], {}), r"labels must have the shape \(2, 37\) of hidden, got \(2, 36\)"),
        (lambda h, w, y: (h, w.T, y, {}), r"weight must be \(vocabulary, 8\), got shape \(8, 50\)"),
        (lambda h, w, y: (h, w, y, {"chunk_tokens": 0}), "chunk_tokens must be a positive integer, got 0"),
    ],
)
def test_refusals(change, message):
    hidden, weight, _, labels = drawn()
    hidden, weight, labels, settings = change(hidden, weight, labels)
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(hidden, weight, labels, **settings)
