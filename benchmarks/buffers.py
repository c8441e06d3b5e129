"""Measure an upper bound of what a pool of exchange buffers could gain.

    python benchmarks/buffers.py
    python benchmarks/buffers.py --table           # the committed result, as the pages show it

A pool keeps freed memory, so that the next round reuses its pages.  With `MALLOC_TRIM_THRESHOLD_` and
`MALLOC_MMAP_THRESHOLD_` glibc does that for every tensor.  The difference between steps of a ring with and without
these settings is therefore an upper bound of the gain of a pool for some of the tensors.  The benchmark also counts
which part of the allocations of a step belongs to the exchange.  On a GPU torch's allocator is such a pool.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from machine import allocated, described
from ranks import on_ranks
from torch.profiler import ProfilerActivity, profile, record_function

from lightning_longnet import Pattern, SequenceShard, attend
from lightning_longnet.attention.parallel import rounds

RANKS, TOKENS, HEADS, HEAD_DIM, STEPS = 2, 16384, 8, 64, 4
PATTERN = Pattern.dilated([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 8, 16], is_causal=True)
# 32 MiB is the largest value that glibc takes for the second; few tensors are larger, and none of the exchange
KEPT = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TOP_PAD_": str(2**26)}
EXCHANGING = ("_fetch", "_send_gradients")
RESULT = Path(__file__).parent / "results" / "buffers-cpu.json"


def work(counts: bool) -> dict[str, Any]:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    torch.manual_seed(dist.get_rank())
    q, k, v, grad = (torch.randn(1, TOKENS // RANKS, HEADS, HEAD_DIM) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    shard = SequenceShard(group, TOKENS // RANKS)

    def step() -> None:
        for x in leaves:
            x.grad = None
        attend(q, k, v, PATTERN, shard=shard, exchange="ring").backward(grad)

    step()
    if counts:
        return counted(step)
    seconds = []
    for _ in range(STEPS):
        dist.barrier()
        begin = perf_counter()
        step()
        took = torch.tensor(perf_counter() - begin)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        seconds.append(round(took.item(), 4))
    return {"seconds": seconds}


def counted(step: Any) -> dict[str, Any]:
    """Return the allocations of a step on rank 0, and how many of them are messages that are sent or received."""
    for name in EXCHANGING:
        inner = getattr(rounds.RoundsCall, name)

        def recorded(*given: Any, inner: Any = inner, **named: Any) -> Any:
            with record_function("exchange"):
                return inner(*given, **named)

        setattr(rounds.RoundsCall, name, recorded)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    spans = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == "exchange"]
    made = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]" and e.nbytes() > 0]
    own = [size for when, size in made if any(begin <= when <= end for begin, end in spans)]
    return {
        "allocations": len(made),
        "allocated_mib": round(sum(size for _, size in made) / 2**20, 1),
        "exchange_allocations": len(own),
        "exchange_mib": round(sum(own) / 2**20, 1),
        "peak_mib": round(allocated(step) / 2**20, 1),
    }


def measured(rounds_: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"given back": [], "kept": []}
    for turn in range(rounds_):
        for name in ("given back", "kept") if turn % 2 else ("kept", "given back"):
            settings = KEPT if name == "kept" else {}
            os.environ |= settings  # new processes read them when they begin
            seconds[name].append(statistics.median(on_ranks(RANKS, work, False)["seconds"]))
            for each in settings:
                del os.environ[each]
    counts = on_ranks(RANKS, work, True)
    return {"machine": described("cpu"), "ranks": RANKS, "tokens": TOKENS, "seconds": seconds, "counts": counts}


def table(result: dict[str, Any]) -> str:
    seconds, counts = result["seconds"], result["counts"]
    ratios = [kept / plain for kept, plain in zip(seconds["kept"], seconds["given back"], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    shown = {name: statistics.median(each) for name, each in seconds.items()}
    return "\n".join(
        [
            "| a step of the ring | |",
            "|---|---|",
            f"| allocations, all | {counts['allocations']:,}, {counts['allocated_mib']:,.0f} MiB |",
            f"| for the exchange | {counts['exchange_allocations']:,}, {counts['exchange_mib']:,.0f} MiB |",
            f"| held at its peak | {counts['peak_mib']:,.0f} MiB |",
            f"| seconds, memory given back | {shown['given back']:.2f} |",
            f"| seconds, all memory kept | {shown['kept']:.2f} |",
            f"| their ratio, and its quartiles | {ratio:.3f}, {low:.2f} to {high:.2f} |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--table", action="store_true", help="print the committed result")
    arguments = parser.parse_args()
    if not arguments.table:
        RESULT.write_text(json.dumps(measured(arguments.rounds), indent=1) + "\n")
    print(table(json.loads(RESULT.read_text())) if RESULT.exists() else "not measured")


if __name__ == "__main__":
    main()
