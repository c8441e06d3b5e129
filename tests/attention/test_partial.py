"""Partials add up in any order, -inf is their identity, and what was added can be taken out."""

from math import inf, log

import torch

from lightning_longnet import Branch, Pattern, attend
from lightning_longnet.attention.kernels.partial import Partial
from lightning_longnet.attention.plan.blocks import make_plan


def partial(scores, values):
    """The attention of one query over some keys."""
    return Partial(torch.softmax(scores, -1) @ values, scores.logsumexp(-1, keepdim=True))


def case():
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(5, 12, generator=generator, dtype=torch.float64)
    return scores, torch.randn(12, 4, generator=generator, dtype=torch.float64)


def none(like):
    return Partial(torch.zeros_like(like.out), torch.full_like(like.lse, -inf))


def test_disjoint_keys_add_up_in_any_order():
    scores, values = case()
    parts = [partial(scores[:, s], values[s]) for s in (slice(0, 2), slice(2, 9), slice(9, 12))]
    truth = partial(scores, values)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        total = none(truth)
        for i in order:
            total.add_(*parts[i])
        torch.testing.assert_close(total, truth)


def test_no_key_changes_nothing():
    truth = partial(*case())
    for total in (Partial(*(x.clone() for x in truth)), none(truth)):
        before = Partial(*(x.clone() for x in total))
        for weight in (1, -1, 3):
            total.add_(*none(truth), weight)
            torch.testing.assert_close(total, before, rtol=0, atol=0)


def test_weights_count_keys_more_than_once_and_take_them_out_again():
    scores, values = case()
    total = partial(scores[:, :5], values[:5])
    total.add_(*partial(scores[:, 5:], values[5:]), 3)
    weighted = scores + torch.tensor([0.0] * 5 + [log(3)] * 7)
    torch.testing.assert_close(total, partial(weighted, values))
    total.add_(*partial(scores[:, 5:], values[5:]), -2)
    torch.testing.assert_close(total, partial(scores, values))


def test_taking_out_everything_leaves_nothing():
    truth = partial(*case())
    total = Partial(*(x.clone() for x in truth))
    total.add_(*truth, -1)
    assert (total.lse == -inf).all()
    assert (total.out == 0).all()


def test_a_row_with_great_scores_stays_where_keys_of_it_do():
    """An lse of 75,000 is rounded to about 0.01 in float32; a bound on that rounding must not remove half of a row."""
    pattern = Pattern((Branch(4, 1, None, True), Branch(9, 1, None, True)), "set")
    assert any(block.weight < 0 for blocks in make_plan(pattern, 2, 2, (0, 36)).branches for block in blocks)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 2, 4, generator=generator).expand(1, 36, 2, 4).clone()
    v = torch.randn(1, 36, 2, 4, generator=generator)

    def results(kernel):
        leaf = v.clone().requires_grad_()
        out, lse = attend(q, q, leaf, pattern, kernel=kernel, return_lse=True, scale=1e4)
        return out, lse, *torch.autograd.grad(out.sum(), leaf)

    truth = results("reference")
    assert truth[1].max() > 5e4
    for kernel in ("sdpa", "eager"):
        out, lse, dv = results(kernel)
        assert lse.isfinite().all()
        torch.testing.assert_close(out, truth[0], rtol=0, atol=0.1)
        torch.testing.assert_close(dv, truth[2], rtol=0, atol=0.1)
