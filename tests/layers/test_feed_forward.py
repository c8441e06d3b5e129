"""FeedForward against its own words."""

import pytest
import torch

from lightning_longnet import FeedForward

ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "relu": lambda x: x.clamp_min(0),
    "silu": lambda x: x / (1 + (-x).exp()),
    "swiglu": lambda x: x[..., :7] / (1 + (-x[..., :7]).exp()) * x[..., 7:],
}


@pytest.mark.parametrize("sub_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_restatement_gradients_included(activation, bias, sub_norm):
    layer = FeedForward(5, 7, activation=activation, bias=bias, sub_norm=sub_norm, dtype=torch.float64)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, grad = torch.randn(2, 2, 6, 5, dtype=torch.float64).unbind()
    x.requires_grad_()
    hidden = ACTIVATIONS[activation](x @ layer.first.weight.T + (layer.first.bias if bias else 0))
    if sub_norm:
        centred = hidden - hidden.mean(-1, keepdim=True)
        hidden = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        hidden = hidden * layer.sub_norm.weight + layer.sub_norm.bias
    truth = hidden @ layer.second.weight.T + (layer.second.bias if bias else 0)
    out = layer(x)
    torch.testing.assert_close(out, truth)
    leaves = [x, *layer.parameters()]
    torch.testing.assert_close(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(truth, leaves, grad))


def test_is_four_times_as_wide_inside():
    assert FeedForward(8).first.out_features == 32
    assert FeedForward(768, activation="swiglu").first.out_features == 2 * 2048


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_chunks_of_tokens_change_nothing_and_hold_less(activation):
    options = {"activation": activation, "sub_norm": True, "dtype": torch.float64}
    whole, chunked = FeedForward(16, 512, dropout=0.3, **options), FeedForward(16, 512, chunk_tokens=10, **options)
    chunked.load_state_dict(whole.state_dict())
    x, grad = torch.randn(2, 3, 64, 16, dtype=torch.float64).unbind()
    x.requires_grad_()
    whole.eval()
    for call in (chunked, chunked.eval()):
        torch.testing.assert_close(call(x), whole(x))
        with torch.no_grad():
            torch.testing.assert_close(call(x), whole(x))
    results = []
    held = []
    for layer in (whole, chunked):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            out = layer(x)
        held.append(sum(sizes))
        results.append(torch.autograd.grad(out, [x, *layer.parameters()], grad))
    torch.testing.assert_close(results[0], results[1])
    assert held[1] < held[0] / 10
    chunked.train().dropout = 0.5
    torch.manual_seed(0)
    by_hand = torch.cat([chunked(piece) for piece in x.split(10, 1)], 1)
    torch.manual_seed(0)
    out = chunked(x)  # what is computed again in the backward drops the same
    torch.testing.assert_close(torch.autograd.grad(out, x, grad), torch.autograd.grad(by_hand, x, grad))


def test_dropout_is_of_the_hidden_values():
    layer = FeedForward(8, 4000, dropout=0.25, activation="relu", bias=False)
    torch.nn.init.ones_(layer.first.weight)
    torch.nn.init.ones_(layer.second.weight)
    out = layer(torch.full((1, 8), 1 / 8)) / 4000  # the share that is kept, over 0.75
    assert out.unique().numel() == 1
    assert abs(out[0, 0].item() - 1) < 0.05
    assert out[0, 0] != 1


REFUSALS = {
    "activation": (
        lambda: FeedForward(8, activation="tanh"),
        "activation must be one of 'gelu', 'relu', 'silu', 'swiglu', got 'tanh'",
    ),
    "embed_dim": (lambda: FeedForward(8.0), "embed_dim must be a positive integer, got 8.0"),
    "hidden_dim": (lambda: FeedForward(8, 0), "hidden_dim must be a positive integer, got 0"),
    "dropout": (lambda: FeedForward(8, dropout=2), "dropout must be at least 0 and less than 1, got 2"),
    "chunk_tokens": (lambda: FeedForward(8, chunk_tokens=0), "chunk_tokens must be a positive integer, got 0"),
    "gain": (lambda: FeedForward(8, gain=-1.0), "gain must be a positive, finite number, got -1.0"),
}


@pytest.mark.parametrize(("call", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
