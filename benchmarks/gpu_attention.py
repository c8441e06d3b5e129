"""Measure one participant of `make gpu` at one length, and print a line of JSON.

    python benchmarks/gpu_attention.py --participant sdpa --tokens 65536
    python benchmarks/gpu_attention.py --participant "scheme cudnn" --tokens 65536    # torchscale's scheme on that op
    python benchmarks/gpu_attention.py --participant "dense sdpa" --tokens 16384      # torch's flash op, all keys

Rates count the distinct (query, key) pairs that the pattern shows, however a participant computes them: 4 operations a
pair and unit of width forward, 14 forward and backward.  The result also holds the rate of torch's own dense attention,
measured just before in the same process, since the clocks of a GPU change.
"""

from __future__ import annotations

import argparse
import json
import statistics
from time import perf_counter
from typing import TYPE_CHECKING, Any

import peers
import scheme
import torch
from machine import allocated

from lightning_longnet import Pattern
from lightning_longnet.planning.flops import attended_pairs
from lightning_longnet.planning.speed import BACKWARD, FORWARD

if TYPE_CHECKING:
    from torch import Tensor

WIDTH = 512  # of all heads together: 8 of 64, or 4 of 128
RATES = (1, 2, 4, 8, 16)
SEGMENTS = (2048, 4096, 8192, 16384, 32768)
YARDSTICK = 16384  # tokens of the dense attention that is measured beside
_LEAST_SECONDS, _LEAST_ROUNDS = 0.5, 5


def participant(name: str, segments: list[int]) -> peers.Call:
    """Return what a name of a participant calls."""
    kind, _, op = name.rpartition(" ")
    if kind == "dense":
        return scheme.dense(op)
    if kind == "scheme":
        return scheme.torchscale(op, segments, RATES[: len(segments)])
    return peers.ours(segments, list(RATES[: len(segments)]), True, kernel=name)


def distinct_pairs(name: str, segments: list[int], tokens: int, heads: int) -> int:
    """Return the (query, key) pairs over all heads that a participant shows, each once."""
    if name.startswith("dense"):
        return tokens * (tokens + 1) // 2 * heads
    pattern = Pattern.dilated(segments, RATES[: len(segments)], is_causal=True)
    return attended_pairs(pattern, heads, cuts=(0, tokens)).required


def timed(call: peers.Call, inputs: list[Tensor], grad: Tensor, rounds: int | None) -> list[tuple[float, float]]:
    """Return the seconds of the forward, and of forward and backward, of each round, after two more."""
    seconds: list[tuple[float, float]] = []
    begin = perf_counter()
    for i in range((rounds or 1000) + 2):
        if rounds is None and i >= 2 + _LEAST_ROUNDS and perf_counter() - begin > _LEAST_SECONDS:
            break
        for x in inputs:
            x.grad = None
        start = _now(grad)
        out = call(*inputs)
        middle = _now(grad)
        out.backward(grad)
        seconds.append((middle - start, _now(grad) - start))
        begin = perf_counter() if i == 1 else begin
    return seconds[2:]


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return perf_counter()


def made(tokens: int, head_dim: int, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """Return q, k and v with gradients, and a gradient of out."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, tokens, WIDTH // head_dim, head_dim)
    q, k, v, grad = (torch.randn(shape, dtype=dtype, device=device, generator=generator) for _ in range(4))
    return [x.requires_grad_() for x in (q, k, v)], grad


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the result of one participant."""
    dtype, segments = getattr(torch, options.dtype), [int(each) for each in options.segments.split(",")]
    name, tokens, head_dim = options.participant, options.tokens, options.head_dim
    result: dict[str, Any] = {"participant": name, "tokens": tokens, "head_dim": head_dim, "dtype": options.dtype}
    result["heads"] = WIDTH // head_dim
    if options.yardstick and dtype.itemsize == 2:
        beside = timed(scheme.dense("sdpa"), *made(options.yardstick, head_dim, dtype, options.device), options.rounds)
        result["beside"] = _rates("dense sdpa", options.yardstick, head_dim, beside, segments)
    try:
        inputs, grad = made(tokens, head_dim, dtype, options.device)
        call = participant(name, segments)
        seconds = timed(call, inputs, grad, options.rounds)
        peak = allocated(lambda: call(*inputs).backward(grad), grad.device)
    except torch.cuda.OutOfMemoryError:
        return result | {"out_of_memory": True}
    tensor = grad.numel() * grad.element_size()
    result |= {"peak_mib": round(peak / 2**20, 1), "peak_tensors": round(peak / tensor, 2), "rounds": len(seconds)}
    return result | _rates(name, tokens, head_dim, seconds, segments)


def _rates(
    name: str, tokens: int, head_dim: int, seconds: list[tuple[float, float]], segments: list[int]
) -> dict[str, Any]:
    forward, both = (statistics.median(column) for column in zip(*seconds, strict=True))
    operations = distinct_pairs(name, segments, tokens, WIDTH // head_dim) * head_dim / 1e12
    return {
        "forward_seconds": float(f"{forward:.4g}"),
        "step_seconds": float(f"{both:.4g}"),
        "forward_tflops": round(FORWARD * operations / forward, 3),
        "step_tflops": round((FORWARD + BACKWARD) * operations / both, 3),
        "forward_tokens_per_second": round(tokens / forward),
        "step_tokens_per_second": round(tokens / both),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--participant", required=True, help="a kernel, or `scheme KERNEL`, or `dense KERNEL`")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--head-dim", type=int, default=64, choices=(64, 128))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument(
        "--segments", default=",".join(map(str, SEGMENTS)), help="lengths of the branches; rates double"
    )
    parser.add_argument("--rounds", type=int, help="by default as many as half a second holds, at least five")
    parser.add_argument(
        "--yardstick", type=int, default=YARDSTICK, help="tokens of the dense attention beside; 0: none"
    )
    parser.add_argument("--device", default="cuda")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
