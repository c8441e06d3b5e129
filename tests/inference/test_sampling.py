"""Which tokens are sampled, and with which probability."""

import pytest
import torch

from lightning_longnet.inference.sampling import Sampler, Sampling, probabilities

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, 1.5], [0.0, 0.0, 3.0, 0.0, -2.0]])


def drawn(sampling, logits=LOGITS, times=4000, seen=((3,), (3,))):
    """How often each token is sampled."""
    counts = torch.zeros_like(logits)
    sampler = Sampler(sampling, torch.tensor(seen))
    rows = logits.repeat(times, 1)
    result = sampler.sample(rows).view(times, len(logits))
    for row in range(len(logits)):
        counts[row] = result[:, row].bincount(minlength=logits.shape[1]) / times
    return counts


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, [{0, 4}, {2}]),  # the second row has ties behind its first
        ({"top_p": 0.5}, [{0, 4}, {2}]),
        ({"top_p": 0.9}, [{0, 1, 2, 4}, {0, 2}]),
        ({"min_p": 0.5}, [{0, 4}, {2}]),
        ({"min_p": 0.04}, [{0, 1, 2, 3, 4}, {0, 1, 2, 3}]),
        ({"top_k": 3, "top_p": 0.6}, [{0, 4}, {2}]),
        ({"temperature": 4.0, "min_p": 0.9}, [{0}, {2}]),
    ],
)
def test_limits_keep_the_most_likely_tokens(options, kept):
    result = probabilities(LOGITS, Sampling(**options))
    plain = (LOGITS / options.get("temperature", 1.0)).softmax(1)
    for row, tokens in enumerate(kept):
        if "top_k" in options and row:
            continue
        assert set(result[row].nonzero().flatten().tolist()) == tokens
        shares = result[row] / result[row].sum()
        expected = plain[row] * torch.tensor([float(i in tokens) for i in range(5)])
        torch.testing.assert_close(shares, expected / expected.sum())


def test_samples_follow_the_probabilities_and_the_seed():
    result = drawn(Sampling(temperature=1.3, seed=1))
    torch.testing.assert_close(result, (LOGITS / 1.3).softmax(1), rtol=0, atol=0.04)
    assert torch.equal(result, drawn(Sampling(temperature=1.3, seed=1)))
    assert not torch.equal(result, drawn(Sampling(temperature=1.3, seed=2)))


def test_tokens_of_the_text_are_penalised_and_padding_is_no_token():
    text = torch.tensor([[0, 3, 1], [2, 2, 0]])
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=1.5), text, torch.tensor([[True] * 3, [False] * 3]))
    assert sampler.sample(LOGITS).tolist() == [[4], [2]]  # 2 / 1.5 is below 1.5
    assert sampler.sample(torch.tensor([[1.0, 1.0, 0.6, 0.0, 0.7], [0.0, 0.4, 0.5, 0.0, 0.0]])).tolist() == [[0], [1]]
    negative = Sampler(Sampling(temperature=0, repetition_penalty=3.0), torch.tensor([[0]]))
    assert negative.sample(torch.tensor([[-1.0, -2.0]])).tolist() == [[1]], "they are multiplied, not divided"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"top_k": 0}, "top_k must be a positive integer, got 0"),
        ({"top_p": 0.0}, "top_p must be more than 0 and at most 1, got 0.0"),
        ({"min_p": 1.5}, "min_p must be more than 0 and at most 1, got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a positive"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
