"""Null keys: torchscale's padding of segments that are not full, in the softmax of their queries."""

from pathlib import Path

import pytest
import torch

from lightning_longnet import Pattern, attend

RECORDED = torch.load(Path(__file__).parents[1] / "data/torchscale_ragged.pt", weights_only=True)
DIM = 2


def case_name(case):
    segments, rates, heads, causal, length = case
    words = (*(f"{w}/{r}" for w, r in zip(segments, rates, strict=True)), f"{heads} heads", f"{length} tokens")
    return " ".join(words) + " causal" * causal


def recorded():
    results = RECORDED["results"].split([4 * length * heads * DIM for *_, heads, _, length in RECORDED["cases"]])
    for case, flat in zip(RECORDED["cases"], results, strict=True):
        *_, heads, _, length = case
        yield pytest.param(*case, flat.view(4, 1, length, heads, DIM).unbind(), id=case_name(case))


def inputs(length, heads):
    """What `data/record_ragged.py` gave torchscale."""
    i = torch.arange(length * heads * DIM, dtype=torch.float64)
    rows = [1.5 * (0.7 * i + 0.1).sin(), 1.5 * (1.3 * i + 0.2).sin(), (0.9 * i + 0.3).sin(), (0.37 * i).cos()]
    return [x.view(1, length, heads, DIM) for x in rows]


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "reference"])
@pytest.mark.parametrize(("segments", "rates", "heads", "causal", "length", "truth"), list(recorded()))
def test_outputs_and_gradients_are_torchscales(segments, rates, heads, causal, length, truth, kernel):
    *leaves, grad = inputs(length, heads)
    leaves = [x.requires_grad_() for x in leaves]
    pattern = Pattern.dilated(segments, rates, causal, "blocked", ragged="zero_keys")
    out = attend(*leaves, pattern, mix="detached", kernel=kernel)
    for ours, theirs in zip((out, *torch.autograd.grad(out, leaves, grad)), truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
