"""Measure which shares of its peak a CUDA device reaches in linear maps and in attention, as `longnet plan` uses them.

    python benchmarks/gpu_shares.py

Both are of the peak that the data sheet lists in bfloat16.  Attention counts the pairs that are computed, as a plan
does, by the kernel that "auto" selects.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from gpu_attention import RATES, SEGMENTS, WIDTH, made, timed
from peers import ours

from lightning_longnet import Pattern, explain
from lightning_longnet.attention.spec import AttentionSpec
from lightning_longnet.planning.devices import listed, sheet_name
from lightning_longnet.planning.flops import attended_pairs
from lightning_longnet.planning.speed import BACKWARD, FORWARD

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

TOKENS, DIMS = 8192, (768, 1024, 1536, 2560)  # those of LongNet's four sizes
ATTENDED, HEAD_DIM = 2**16, 64
CALLS, ROUNDS = 1000, 9


def linear_flops(device: str, tokens: int, dims: tuple[int, ...]) -> float:
    """Return operations a second of a feed-forward's products, the median over the widths."""
    rates = []
    for dim in dims:
        x = torch.randn(tokens, dim, dtype=torch.bfloat16, device=device)
        wide = torch.randn(dim, 4 * dim, dtype=torch.bfloat16, device=device)
        seconds = _median(partial(_products, x, wide, wide.mT.contiguous()), device)
        rates.append(16 * tokens * dim**2 / seconds)
    return statistics.median(rates)


def _products(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return x @ first @ second


def attention_flops(device: str, tokens: int) -> float:
    """Return operations a second of attention forward and backward, of the pairs that are computed."""
    segments, heads = [min(each, tokens) for each in SEGMENTS], WIDTH // HEAD_DIM
    inputs, grad = made(tokens, HEAD_DIM, torch.bfloat16, device)
    pattern = Pattern.dilated(segments, RATES, is_causal=True)
    kernel = explain(inputs[0], inputs[1], inputs[2], pattern).chosen or ""
    weighted = AttentionSpec(pattern, kernel).weighted_segments(device, 1, torch.get_num_threads(), per_branch=False)
    pairs = attended_pairs(pattern, heads, cuts=(0, tokens), weighted_segments=weighted).computed
    both = statistics.median(each for _, each in timed(ours(segments, list(RATES), True), inputs, grad, None))
    return (FORWARD + BACKWARD) * pairs * HEAD_DIM / both


def call_seconds(device: str) -> float:
    """Return the seconds of an operator that computes next to nothing."""
    x = torch.zeros(8, device=device)

    def many() -> None:
        for _ in range(CALLS):
            x.add_(1)

    return _median(many, device) / CALLS


def _median(call: Callable[[], Any], device: str) -> float:
    seconds = []
    for _ in range(ROUNDS + 2):
        begin = perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(perf_counter() - begin)
    return statistics.median(seconds[2:])


def measure() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name()
    peak, sheet = listed(gpu, torch.bfloat16), sheet_name(gpu)
    if peak is None or sheet is None:
        raise ValueError(f"no data sheet of {gpu} is known: its shares of a peak cannot be measured")
    return {
        "device": sheet,
        "gpu": gpu,
        "linear": round(linear_flops("cuda", TOKENS, DIMS) / peak, 3),
        "attention": round(attention_flops("cuda", ATTENDED) / peak, 3),
        "call_seconds": float(f"{call_seconds('cuda'):.3g}"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(json.dumps(measure()))
