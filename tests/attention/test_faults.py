"""Known faults of implementations before this one, each with the input that shows it.

Every test computes what the faulty rule would give too, and asserts that it differs: the input is one that bites.
"""

import brute
import drawn
import pytest
import torch
from brute import Shown

from lightning_longnet import Branch, Pattern, attend

KERNELS = pytest.mark.parametrize("kernel", ["sdpa", "eager", "reference"])


def result(pattern, q, k, v, grad, **settings):
    out = attend(q, k, v, pattern, **settings)
    return out, *torch.autograd.grad(out, (q, k, v), grad)


def truth(shown, q, k, v, grad, mix="exact", tables=None):
    tables = tables or brute.counts(shown, "multiset", q.shape[1], k.shape[2])
    out = brute.attention(q, k, v, [tables] * q.shape[0], q.shape[3] ** -0.5, mix)[0]
    return out, *torch.autograd.grad(out, (q, k, v), grad)


def distance(a, b):
    return (a - b).abs().max() / b.abs().max()


@KERNELS
def test_the_branch_weights_have_a_gradient(kernel):
    """Torchscale mixes the branches under no_grad: dq is off by up to a third of its largest value."""
    tensors = drawn.tensors((1, 32, 4, 4, 8))
    shown = [Shown(8, 1, None, True), Shown(32, 4, None, True)]
    outcome = result(drawn.pattern_of(shown, "multiset"), *tensors, kernel=kernel)
    torch.testing.assert_close(outcome, truth(shown, *tensors))
    without = truth(shown, *tensors, mix="detached")
    assert distance(without[1], outcome[1]) > 0.1
    torch.testing.assert_close(
        result(drawn.pattern_of(shown, "multiset"), *tensors, kernel=kernel, mix="detached"), without
    )


@KERNELS
def test_a_ragged_tail_attends_to_no_padding(kernel):
    """Torchscale pads the tail with zeros, which take part in the softmax where nothing is causal: only where asked."""
    tensors = drawn.tensors((1, 13, 2, 2, 4))
    shown = [Shown(8), Shown(16, 2)]
    outcome = result(drawn.pattern_of(shown, "multiset"), *tensors, kernel=kernel)
    torch.testing.assert_close(outcome, truth(shown, *tensors))
    padded = [torch.cat([x, x.new_zeros(1, 3, *x.shape[2:])], 1) for x in tensors[:3]]
    wrong = brute.attention(*padded, [brute.counts(shown, "multiset", 16, 2)], 0.5)[0][:, :13]
    assert distance(wrong, outcome[0]) > 0.05


@KERNELS
def test_a_rate_that_does_not_divide_its_segment_begins_anew_in_each(kernel):
    """Torchscale scatters later segments to the wrong rows: the paper's own branch (16384, 6) among them."""
    tensors = drawn.tensors((1, 24, 3, 3, 4))
    shown = [Shown(8), Shown(8, 3)]
    torch.testing.assert_close(
        result(drawn.pattern_of(shown, "multiset"), *tensors, kernel=kernel), truth(shown, *tensors)
    )
    served = Pattern.dilated((8,), (3,)).mask(24, 3)[0].diagonal().nonzero().flatten().tolist()
    assert served == [0, 3, 6, 8, 11, 14, 16, 19, 22]  # and not 0, 3, 6, 9, ..., a dilation of the whole sequence


@KERNELS
def test_every_head_takes_part_in_every_branch(kernel):
    """dilated-attention-pytorch hands each head to one branch only, and unequal groups overwrite each other."""
    tensors = drawn.tensors((1, 24, 3, 3, 4))
    shown = [Shown(6), Shown(24, 2)]
    outcome = result(drawn.pattern_of(shown, "multiset"), *tensors, kernel=kernel)
    torch.testing.assert_close(outcome, truth(shown, *tensors))
    near, far = brute.counts(shown, "multiset", 24, 3)
    near[2:], far[:2] = 0, 0
    assert distance(truth(shown, *tensors, tables=[near, far])[0], outcome[0]) > 0.1
    counts = drawn.pattern_of(shown, "multiset").mask(24, 3)
    assert all((counts[h] == 2).any() and (counts[h] == 1).any() for h in range(3))


@KERNELS
def test_outputs_are_means_of_values_and_leak_nothing_from_the_future(kernel):
    """dilated-attention-pytorch divides by a signed sum over the tokens, future ones among them."""
    q, k, v, _ = drawn.tensors((1, 40, 4, 4, 8))
    pattern = Pattern.dilated((8, 32), (1, 4), is_causal=True)
    ones = attend(q, k, torch.ones_like(v), pattern, kernel=kernel)
    torch.testing.assert_close(ones, torch.ones_like(ones))
    before = attend(q, k, v, pattern, kernel=kernel)
    later = v.detach().clone()
    later[:, 20:] += 5
    torch.testing.assert_close(attend(q, k, later, pattern, kernel=kernel)[:, :20], before[:, :20], rtol=0, atol=0)


@KERNELS
def test_dilation_is_local_to_a_segment(kernel):
    """The ancestor dilated the whole sequence: with it, residue 1 of segment 1 is another row where w % r != 0."""
    tensors = drawn.tensors((1, 20, 2, 2, 4))
    shown = [Shown(5, 2)]
    outcome = result(drawn.pattern_of(shown, "multiset"), *tensors, kernel=kernel)
    torch.testing.assert_close(outcome, truth(shown, *tensors))
    rows = torch.arange(20)
    whole = torch.stack(
        [(rows[:, None] % 2 == h) & (rows % 2 == h) & (rows[:, None] // 5 == rows // 5) for h in range(2)]
    )
    assert distance(truth(shown, *tensors, tables=[whole.double()])[0], outcome[0]) > 0.1


@KERNELS
def test_tokens_attend_to_tokens_and_not_heads_to_heads(kernel):
    """The ancestor's fastest class took the softmax over heads."""
    q, k, v, _ = drawn.tensors((1, 12, 3, 3, 4))
    out = attend(q, k, v, Pattern.dense(), kernel=kernel)
    alone = torch.cat(
        [attend(*(x[:, :, h : h + 1] for x in (q, k, v)), Pattern.dense(), kernel=kernel) for h in range(3)], 2
    )
    torch.testing.assert_close(out, alone)
    turned = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attend(q, k[:, turned], v[:, turned], Pattern.dense(), kernel=kernel), out)


@KERNELS
def test_causal_hides_the_future_and_not_the_past(kernel):
    """The ancestor's mask was inverted."""
    q, k, v, _ = drawn.tensors((1, 9, 2, 2, 4))
    out = attend(q, k, v, Pattern.dense(is_causal=True), kernel=kernel)
    torch.testing.assert_close(out[:, 0], v[:, 0])
    torch.testing.assert_close(out[:, -1], attend(q, k, v, Pattern.dense(), kernel=kernel)[:, -1])


@KERNELS
def test_branches_share_one_softmax(kernel):
    """The ancestor added up the softmaxes of its blocks: weights that sum to the number of blocks."""
    tensors = drawn.tensors((1, 16, 2, 2, 4))
    shown = [Shown(4), Shown(16)]
    outcome = result(drawn.pattern_of(shown, "multiset"), *tensors, kernel=kernel)
    torch.testing.assert_close(outcome, truth(shown, *tensors))
    summed = sum(truth([each], *tensors)[0] for each in shown)
    assert distance(summed, outcome[0]) > 0.1


@KERNELS
def test_a_key_that_two_branches_show_counts_twice_or_once_as_asked(kernel):
    q, k, v, _ = drawn.tensors((1, 8, 1, 1, 4))
    twice = Branch(4), Branch(4)
    once = attend(q, k, v, Pattern.dilated((4,), (1,)), kernel=kernel, return_lse=True)
    doubled = attend(q, k, v, Pattern(twice), kernel=kernel, return_lse=True)
    torch.testing.assert_close(doubled[0], once[0])
    torch.testing.assert_close(doubled[1], once[1] + torch.tensor(2.0, dtype=torch.float64).log())
    torch.testing.assert_close(attend(q, k, v, Pattern(twice, "set"), kernel=kernel, return_lse=True), once)
