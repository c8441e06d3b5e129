"""Measure the speed and peak memory of dilated attention and of its peers, interleaved in one process.

    python benchmarks/attention.py --torchscale ~/src/torchscale --dilated-attention-pytorch ~/src/dilated
    python benchmarks/attention.py --device cuda    # each of our kernels, and dense attention
    python benchmarks/attention.py --table          # the committed result, as the pages show it
    python benchmarks/attention.py --plot-only      # draws the committed result again

Each round runs every participant once, so that a slow moment of the machine affects all of them.  Results are medians
over the rounds.  Peak memory is that of torch's allocator, without the inputs and the incoming gradient; on a CPU it is
computed from the events of a profiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import peers
import torch
from figure import draw
from machine import allocated, described
from torch import Tensor

from lightning_longnet import Pattern, explain
from lightning_longnet.attention.kernels.products import routed_products
from lightning_longnet.attention.plan.blocks import plan

if TYPE_CHECKING:
    from collections.abc import Callable

HEADS, HEAD_DIM = 8, 64
PATTERNS = {
    "two branches": ([2048, 4096], [1, 2]),
    "five branches": ([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 8, 16]),
}
RESULTS = Path(__file__).parent / "results"
DENSE_UP_TO = {"cpu": 8192, "cuda": 65536}  # its time grows with the square of the length
TABLE_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


class Participant(NamedTuple):
    call: peers.Call
    routing: Callable[[], AbstractContextManager[None]] = nullcontext


def participants(name: str, dtype: torch.dtype, length: int, options: argparse.Namespace) -> dict[str, Participant]:
    w, r = PATTERNS[name]
    calls = {"lightning-longnet": Participant(peers.ours(w, r, True))}
    if options.device == "cuda":
        x = torch.empty(1, length, HEADS, HEAD_DIM, dtype=dtype, device="cuda")
        for verdict in explain(x, x, x, Pattern.dilated(w, r, True)).verdicts:
            if not verdict.refusals and verdict.kernel != "reference":
                call = peers.ours(w, r, True, kernel=verdict.kernel)
                calls[f"lightning-longnet, {verdict.kernel}"] = Participant(call)
    if len(w) > 2:  # torchscale's offsets, which do not nest from the third branch on, so pairs are computed twice
        calls["lightning-longnet, blocked"] = Participant(peers.ours(w, r, True, "blocked"))
    if name == "five branches":
        calls["lightning-longnet, padded"] = Participant(peers.ours(w, r, True, padding=0.25))
        calls["lightning-longnet, dropout 0.1"] = Participant(peers.ours(w, r, True, dropout=0.1))
    if options.device == "cpu":  # on other devices the peers need further libraries
        scale = peers.torchscale(options.torchscale, HEADS, w, r, True)
        pytorch = peers.dilated_attention_pytorch(options.dilated_attention_pytorch, w, r, True)
        if scale is not None:
            calls["torchscale"] = Participant(scale)
            calls["torchscale, routed"] = Participant(scale, routed_products)
        if pytorch is not None and length % max(w) == 0:  # it refuses other lengths
            calls["dilated-attention-pytorch"] = Participant(pytorch)
    if length <= DENSE_UP_TO[options.device]:
        calls["dense"] = Participant(peers.dense(True))
        if options.device == "cpu":
            calls["dense, routed"] = Participant(peers.dense(True), routed_products)
    return calls


def now(device: torch.device) -> float:
    """Return the time, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def step(participant: Participant, inputs: list[Tensor], grad: Tensor) -> tuple[float, float]:
    """Return the seconds of the forward, and of forward and backward together."""
    for x in inputs:
        x.grad = None
    with participant.routing():
        begin = now(grad.device)
        out = participant.call(*inputs)
        middle = now(grad.device)
        out.backward(grad)
        end = now(grad.device)
    return middle - begin, end - begin


def peak_bytes(participant: Participant, inputs: list[Tensor], grad: Tensor) -> int:
    """Return the peak memory of a forward and backward in bytes, without what was allocated before."""
    for x in inputs:
        x.grad = None
    with participant.routing():
        return allocated(lambda: participant.call(*inputs).backward(grad), grad.device)


def measure(name: str, dtype: torch.dtype, length: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, length, HEADS, HEAD_DIM)
    q, k, v, grad = (torch.randn(shape, generator=generator).to(options.device, dtype) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    running = participants(name, dtype, length, options)
    seconds: dict[str, list[tuple[float, float]]] = {key: [] for key in running}
    peaks = {key: peak_bytes(each, inputs, grad) for key, each in running.items()}  # also warms up
    for _ in range(options.rounds or (3 if length > 16384 else 5)):
        for key, each in running.items():
            seconds[key].append(step(each, inputs, grad))
    dilated = plan(Pattern.dilated(*PATTERNS[name], is_causal=True), HEADS, HEADS, (0, length))
    every = length * (length + 1) // 2 * HEADS
    rows = []
    for key, times in seconds.items():
        forward, both = (statistics.median(column) for column in zip(*times, strict=True))
        # padding hides some pairs, and dilated-attention-pytorch gives each head to one branch
        is_another = key.endswith("padded") or key == "dilated-attention-pytorch"
        pairs = every if "dense" in key else None if is_another else dilated.pairs
        rows.append(
            {
                "pattern": name,
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": length,
                "participant": key,
                "forward_seconds": round(forward, 5),
                "step_seconds": round(both, 5),
                "fastest_step_seconds": round(min(t[1] for t in times), 5),
                "tokens_per_second": round(length / both),
                # two products of D multiply-adds a pair forward, five backward
                "useful_gflops": pairs and round(14 * HEAD_DIM * pairs / both / 1e9, 1),
                "peak_mib": round(peaks[key] / 2**20, 1),
                "peak_tensors": round(peaks[key] / (length * HEADS * HEAD_DIM * dtype.itemsize), 2),
                "rounds": len(times),
            }
        )
    return rows


def table(result: dict[str, Any], dtype: str) -> str:
    """Return the rows of the five-branch pattern in one dtype as a Markdown table."""
    rows = [r for r in result["rows"] if r["pattern"] == "five branches" and r["dtype"] == dtype]
    names = list(dict.fromkeys(r["participant"] for r in rows))
    lines = ["| tokens | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for tokens in sorted({r["tokens"] for r in rows}):
        cells = []
        for name in names:
            match = [r for r in rows if r["tokens"] == tokens and r["participant"] == name]
            cells.append(f"{match[0]['step_seconds'] * 1e3:,.0f} ms, {match[0]['peak_tensors']:.1f}" if match else "")
        lines.append(f"| {tokens:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=PATTERNS)
    parser.add_argument("--rounds", type=int, help="of each measurement; by default more for the short ones")
    parser.add_argument("--torchscale", metavar="PATH", help="a checkout of torchscale, where none is installed")
    parser.add_argument("--dilated-attention-pytorch", metavar="PATH", help="the same for dilated-attention-pytorch")
    parser.add_argument("--out", type=Path, help="where to write the JSON; the plot stands beside it")
    parser.add_argument("--table", action="store_true", help="print the table of the result at --out, measure nothing")
    parser.add_argument("--plot-only", action="store_true", help="draw the result at --out again, measure nothing")
    options = parser.parse_args()
    options.out = options.out or RESULTS / f"attention-{options.device}.json"
    if options.table:
        is_there = options.out.exists()
        print(table(json.loads(options.out.read_text()), TABLE_DTYPE[options.device]) if is_there else "not measured")
        return
    if options.plot_only:
        draw(json.loads(options.out.read_text()), options.out.with_suffix(".png"))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "no CUDA device: torch.cuda.is_available() is False\n")
    result: dict[str, Any] = {"machine": described(options.device) | {"heads": HEADS, "head_dim": HEAD_DIM}, "rows": []}
    for name in options.patterns:
        for dtype in options.dtypes:
            for length in options.lengths:
                rows = measure(name, getattr(torch, dtype), length, options)
                result["rows"] += rows
                for row in rows:
                    print(
                        f"{name:14} {dtype:9} {length:6} {row['participant']:30} {row['forward_seconds'] * 1e3:8.0f} ms"
                        f" {row['step_seconds'] * 1e3:8.0f} ms {row['useful_gflops'] or 0:6.0f} useful GFLOP/s"
                        f" {row['peak_mib']:8.0f} MiB {row['peak_tensors']:6.2f} tensors",
                        flush=True,
                    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
    else:
        draw(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
