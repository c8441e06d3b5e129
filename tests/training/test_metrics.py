"""Figures of a model of tokens, from sums: those of all logits at once."""

from math import log

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.text import Perplexity as OfLogits

from lightning_longnet.training.metrics import BitsPerByte, MeanLoss, Perplexity


def test_they_are_those_of_all_logits_at_once():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 11, 7), torch.randint(7, (6, 11))
    labels[2, 4:], labels[5] = -100, -100
    of_logits = OfLogits(ignore_index=-100)
    of_logits.update(logits, labels)
    metrics = MeanLoss(), Perplexity(), BitsPerByte(3.5)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):  # of other numbers of tokens each
        nats = F.cross_entropy(logits[rows].flatten(0, 1), labels[rows].flatten(), ignore_index=-100, reduction="sum")
        for metric in metrics:
            metric.update(nats, (labels[rows] != -100).sum())
    mean, perplexity, bits = (metric.compute().item() for metric in metrics)
    assert perplexity == pytest.approx(of_logits.compute().item(), rel=1e-5)
    assert mean == pytest.approx(log(perplexity))
    assert bits == pytest.approx(mean / log(2) / 3.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_module_of_few_digits_counts_all_tokens(dtype):
    module = torch.nn.ModuleDict({"mean": MeanLoss(), "perplexity": Perplexity()}).to(dtype)
    for i in range(1000):
        for metric in module.values():
            metric.update(torch.tensor(float(i % 3), dtype=dtype), 1)
    assert module["mean"].token_count == 1000
    assert module["mean"].compute().item() == pytest.approx(0.999)
    assert module["perplexity"].compute().log().item() == pytest.approx(0.999)
    moved = module.to("meta")
    assert moved["mean"].loss_sum.device.type == "meta"


def test_bytes_of_a_token_are_positive():
    with pytest.raises(ValueError, match="bytes_per_token must be positive, got 0"):
        BitsPerByte(0)
