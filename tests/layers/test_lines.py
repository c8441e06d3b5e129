"""Layers that draw their pattern along a curve: whatever mask, mode or rank they meet, the curve is their own."""

import pytest
import torch
from contexts import made

from lightning_longnet import DilatedAttention, Guard, MultiheadDilatedAttention, Pattern, attach_context
from lightning_longnet.sequence import SequenceContext

SHORT, LONG = (Pattern.dilated((w,), (1,), is_causal=True) for w in (8, 32))
NESTED = Pattern.dilated((8, 32), (1, 2), is_causal=True)
LENGTH = 64


def along(pattern):
    return DilatedAttention(pattern, ordering="hilbert")


def drawn(tokens=LENGTH):
    torch.manual_seed(0)
    return torch.randn(3, 1, tokens, 2, 8, dtype=torch.float64)


def hidden():
    return torch.arange(LENGTH)[None] >= 50


def test_layers_of_two_curves_may_share_a_mask():
    layers = along(SHORT), along(LONG), along(NESTED)
    expected = [layer(*drawn(), key_padding_mask=hidden()) for layer in layers]
    context, mask = SequenceContext(), hidden()
    for layer in layers:
        attach_context(layer, context)
    context.begin(LENGTH)
    for layer, truth in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer(*drawn(), key_padding_mask=mask), truth)


def padded(group):
    torch.manual_seed(0)
    layer = MultiheadDilatedAttention(16, 2, pattern=SHORT, batch_first=True, ordering="hilbert").double()
    x = torch.randn(1, LENGTH, 16, dtype=torch.float64)
    truth = layer(x, x, x, key_padding_mask=hidden())[0]
    context = made(group)
    attach_context(layer, context)
    given = context.split({"x": x, "hidden": hidden()}, {"x": 1, "hidden": 1})
    out = layer(*[given["x"]] * 3, key_padding_mask=given["hidden"])[0]
    return (out - truth[:, context.positions]).abs().max().item()


def test_bools_hide_the_same_keys_over_ranks(pool):
    assert max(pool.run(2, padded)) < 1e-12


def test_keys_of_other_tokens_are_refused():
    q, k, v = drawn(40)
    for tokens in (20, 39):
        with pytest.raises(ValueError, match=rf"k must have the batch and tokens of q, \(1, {tokens}\), got \(1, 40\)"):
            along(SHORT)(q[:, :tokens], k, v)


def fewer(group):
    layer, context = along(SHORT), made(group)
    attach_context(layer, context)
    context.begin(LENGTH)
    q, k, v = drawn(LENGTH // 2)
    kept = 20 if group.rank() == 0 else LENGTH // 2
    try:
        layer(q, k[:, :kept], v)
    except ValueError as error:
        return str(error)


def test_a_rank_that_has_too_few_keys_is_named_on_all(pool):
    own, other = pool.run(2, fewer)
    assert own == "k must have the batch and tokens of q, (1, 32), got (1, 20)"
    assert other.startswith("rank 0 of the group was given arguments that do not fit")


def test_a_curve_of_inference_serves_training():
    q, k, v = drawn(37)  # a length that nothing else has drawn
    with torch.inference_mode():
        expected = along(NESTED)(q, k, v)
    out = along(NESTED)(q.requires_grad_(), k, v)
    out.sum().backward()
    assert torch.equal(out.detach(), expected)
    assert q.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled():
    q, k, v = drawn(41)
    for pattern in (SHORT, NESTED, Pattern.window(5, is_causal=True)):
        layer = along(pattern)
        torch.testing.assert_close(torch.compile(layer, backend="eager")(q, k, v), layer(q, k, v))


def test_a_guard_tries_the_kernel_that_hides_later_keys():
    guard = Guard()
    pattern = Pattern.window(5, is_causal=True) + NESTED
    layer = DilatedAttention(pattern, ordering="hilbert", guard=guard)
    torch.testing.assert_close(layer(*drawn()), along(pattern)(*drawn()))
    assert guard.counts == {"preflights": 1, "replacements": 0, "refusals": 0, "failures": 0}
