"""Dropout: which pairs it takes, how many, and that the answer is the same however it is computed."""

import brute
import drawn
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_longnet import Pattern, attend
from lightning_longnet.attention.kernels import block_calls, eager
from lightning_longnet.attention.kernels.dropout import Dropout

LONGNET = Pattern.dilated((16, 32, 64), (1, 2, 4), is_causal=True)


def dropped(probability, seed, length, sample=0, head=0, branch=0):
    rule, tokens = Dropout(probability, seed), torch.arange(length)
    words = rule.query_words(torch.tensor([sample]), tokens, torch.tensor([head]), branch)[0]
    return rule.keep_bits(words, rule.key_words(tokens)) == 0


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_the_rule_is_what_brute_force_says(seed):
    for sample, head, branch in [(0, 0, 0), (3, 1, 2), (2**31, 70, 5)]:
        truth = torch.tensor(brute.is_dropped(0.3, seed, sample, head, branch, 70))
        assert torch.equal(dropped(0.3, seed, 70, sample, head, branch), truth)


@pytest.mark.parametrize("probability", [0.02, 0.1, 0.5, 0.9])
def test_mean_and_variance_in_all_directions(probability):
    """Each figure is a sum of about 10**6 independent draws, if they are independent."""
    n, p = 1024, probability
    variance = p * (1 - p)
    for seed in range(3):
        c = dropped(p, seed, n).double() - p
        other_head, other_branch, other_seed = (
            dropped(p, *each).double() - p for each in ((seed, n, 0, 1), (seed, n, 0, 0, 1), (seed + 10, n))
        )
        assert abs(c.sum()) < 5 * (variance * n * n) ** 0.5
        for towards in (0, 1):  # the sums over rows and columns spread as those of independent draws
            assert c.sum(towards).square().mean() == pytest.approx(n * variance, rel=5 * (2 / n) ** 0.5)
        for a, b in [
            (c[1:], c[:-1]),
            (c[:, 1:], c[:, :-1]),
            (c[8:], c[:-8]),
            (c, c.T),
            (c, other_head),
            (c, other_branch),
            (c, other_seed),
        ]:
            product = (a * b).tril(-1) if b is not a and torch.equal(b, a.T) else a * b
            assert abs(product.sum()) < 5 * variance * n
        corners = c[::2, ::2] * c[1::2, ::2] * c[::2, 1::2] * c[1::2, 1::2]
        assert abs(corners.sum()) < 5 * variance**2 * n / 2


def test_no_two_rows_are_alike():
    c = dropped(0.5, 3, 2048).double() * 2 - 1
    alike = (c @ c.T / 2048**0.5).fill_diagonal_(0)
    assert alike.abs().max() < 7
    assert alike.std() == pytest.approx(1, abs=0.01)


@pytest.mark.long
def test_the_expected_output_is_that_without_dropout():
    q, k, v, _ = drawn.tensors((1, 24, 2, 2, 4))
    truth = attend(q, k, v, LONGNET)
    outs = torch.stack([attend(q, k, v, LONGNET, dropout=0.2, dropout_seed=s).detach() for s in range(600)])
    error = outs.std(0) / len(outs) ** 0.5
    assert ((outs.mean(0) - truth).abs() <= 5 * error + 1e-12).all()
    assert (error > 0).any()


def test_the_log_sum_is_that_without_dropout():
    q, k, v, _ = drawn.tensors((2, 40, 4, 2, 4))
    result = attend(q, k, v, LONGNET, dropout=0.5, return_lse=True)[1]
    torch.testing.assert_close(result, attend(q, k, v, LONGNET, return_lse=True)[1])


def test_how_the_work_is_cut_changes_nothing(monkeypatch):
    q, k, v, grad = drawn.tensors((2, 70, 6, 3, 4))
    documents = torch.arange(70) // 25
    hidden = torch.arange(70).expand(2, 70) % 11 == 0
    results = []
    for share, tile, rows in ((1 / 8, 2**19, 32), (1e-9, 8, 1), (1e9, 300, 7)):
        monkeypatch.setattr(block_calls, "WHOLE_BYTES", 0)  # these results are small: they would not be cut
        monkeypatch.setattr(block_calls, "CALL_SHARE", share)
        monkeypatch.setitem(eager._TILE, "cpu", tile)
        monkeypatch.setattr(eager, "_ROWS", rows)
        out = attend(q, k, v, LONGNET, documents=documents, key_padding_mask=hidden, dropout=0.3, dropout_seed=5)
        results.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-12)


def test_samples_are_dropped_by_their_place_in_the_batch_whatever_their_documents():
    q, k, v, _ = (x.detach() for x in drawn.tensors((3, 40, 2, 2, 4)))
    ids = torch.stack([torch.arange(40) // n for n in (40, 10, 10)])  # the first sample gets a plan of its own
    settings = {"dropout": 0.4, "dropout_seed": 1}
    # the samples run in calls of other shapes, which round otherwise
    out = attend(q, k, v, LONGNET, documents=ids, **settings)
    torch.testing.assert_close(out[0], attend(q, k, v, LONGNET, **settings)[0], rtol=0, atol=1e-14)
    again = attend(q, k, v, LONGNET, documents=ids[1].expand(3, 40), **settings)
    torch.testing.assert_close(out[1:], again[1:])


@pytest.mark.parametrize("kernel", ["eager", "reference"])
def test_ranks_that_samples_are_dealt_out_to_drop_what_one_process_would(kernel):
    q, k, v, _ = (x.detach() for x in drawn.tensors((4, 40, 2, 2, 4)))
    settings = {"dropout": 0.4, "dropout_seed": 1, "kernel": kernel}
    whole = attend(q, k, v, LONGNET, **settings)
    for rank in range(2):
        mine = slice(rank, None, 2)
        out = attend(q[mine], k[mine], v[mine], LONGNET, dropout_samples=(rank, 2), **settings)
        torch.testing.assert_close(out, whole[mine])
    for wrong in ((0,), [0, 1], (0, 1.0)):
        with pytest.raises(ValueError, match="dropout_samples must be two integers"):
            attend(q, k, v, LONGNET, dropout_samples=wrong, **settings)


def test_the_seed_decides():
    q, k, v, _ = drawn.tensors((1, 40, 2, 2, 4))

    def result(**settings):
        return attend(q, k, v, LONGNET, dropout=0.2, **settings)

    assert torch.equal(result(dropout_seed=3), result(dropout_seed=torch.tensor(3)))
    assert not torch.equal(result(dropout_seed=3), result(dropout_seed=4))
    torch.manual_seed(0)
    first, second = result(), result()
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(result(), first)


def test_no_dropout_draws_no_seed_and_changes_nothing():
    q, k, v, _ = drawn.tensors((1, 40, 2, 2, 4))
    before = torch.get_rng_state()
    assert torch.equal(attend(q, k, v, LONGNET, dropout=0.0, dropout_seed=3), attend(q, k, v, LONGNET))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_drops_the_same(reentrant):
    results = []
    for call in (
        attend,
        lambda *a, **s: (
            checkpoint(attend, *a, use_reentrant=reentrant, **s)
            if not reentrant
            else checkpoint(lambda *b: attend(*b, **s), *a, use_reentrant=True)
        ),
    ):
        torch.manual_seed(7)
        q, k, v, grad = drawn.tensors((2, 40, 4, 2, 8))
        out = call(q, k, v, LONGNET, dropout=0.3)
        torch.manual_seed(100)  # what happens between forward and backward must not matter
        out.backward(grad)
        results.append((out, q.grad, k.grad, v.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_dropout_of_nearly_all_stays_finite():
    q, k, v, grad = drawn.tensors((1, 40, 2, 2, 4), dtype=torch.float32)
    out = attend(q * 30, k * 30, v, LONGNET, dropout=0.99, dropout_seed=0)
    assert out.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out, (q, k, v), grad))
