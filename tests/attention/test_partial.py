"""Partials add up in any order, -inf is their identity, and what was added can be taken out."""

from math import inf, log

import torch

from lightning_longnet.attention.kernels.partial import Partial


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
