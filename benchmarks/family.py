"""Measure all presets, as the ancestor measured its classes, and the memory of a rank for several numbers of ranks.

    python benchmarks/family.py
    python benchmarks/family.py --case 2 8192        # measures one case again: ranks and tokens
    python benchmarks/family.py --memory             # measures only the second table
    python benchmarks/family.py --table              # the committed result, as the pages show it

Every rank is a process of one thread on this machine, and messages use gloo.  Each round runs a forward and backward of
every preset, on all ranks together, and begins with another preset.  The time of a step is that of its slowest rank.
Results are medians over the rounds; the ratio to "production" is the median of the ratios of the rounds.  Peaks are
those of torch's allocator on the rank with the most, without what was allocated before the step.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from machine import allocated, described
from ranks import on_ranks

from lightning_longnet import attach_context, create_standardized_ring_attention, sequence_mesh
from lightning_longnet.sequence import SequenceContext

if TYPE_CHECKING:
    from collections.abc import Callable

PRESETS = ("hilbert", "production", "block_sparse", "ring", "collective")
HEADS, HEAD_DIM = 8, 64
BRANCHES = {"segment_lengths": [2048, 4096], "dilation_rates": [1, 2]}
CASES = [(1, 4096), (1, 8192), (2, 4096), (2, 8192)]
# one segment over all ranks, so that keys travel however many they are
MEMORY_RANKS, MEMORY_TOKENS = (1, 2, 4, 8), 8192
MEMORY_BRANCHES = {"segment_lengths": [2048, 8192], "dilation_rates": [1, 4]}
ROUNDS = 5
RESULT = Path(__file__).parent / "results" / "family-cpu.json"
MIB = 2**20


def work(ranks: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    dist.init_process_group("gloo")
    context = SequenceContext(sequence_mesh(ranks))
    rows = timed(context, tokens, rounds) if rounds else [held(context, tokens)]
    return [{"ranks": ranks, "tokens": tokens, **row} for row in rows]


def step_of(context: SequenceContext, preset: str, tokens: int, branches: dict[str, Any]) -> Callable[[], None]:
    layer = create_standardized_ring_attention(preset, **branches)
    attach_context(layer, context)
    generator = torch.Generator().manual_seed(context.sequence_parallel_rank)
    shape = 1, tokens // context.sequence_parallel_size, HEADS, HEAD_DIM
    *inputs, grad = (torch.randn(shape, generator=generator) for _ in range(4))
    for x in inputs:
        x.requires_grad_()

    def step() -> None:
        for x in inputs:
            x.grad = None
        layer(*inputs).backward(grad)

    return step


def most(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total, dist.ReduceOp.MAX)
    return total.item()


def timed(context: SequenceContext, tokens: int, rounds: int) -> list[dict[str, Any]]:
    context.begin(tokens)
    steps = {name: step_of(context, name, tokens, BRANCHES) for name in PRESETS}
    peaks = {name: (step(), most(allocated(step)))[1] for name, step in steps.items()}  # after a first one
    times: dict[str, list[float]] = {name: [] for name in PRESETS}
    for turn in range(rounds):
        for name in (*PRESETS[turn % len(PRESETS) :], *PRESETS[: turn % len(PRESETS)]):
            dist.barrier()
            begin = perf_counter()
            steps[name]()
            times[name].append(most(perf_counter() - begin))
    return [
        {
            "preset": name,
            "tokens_per_second": round(tokens / statistics.median(seconds)),
            "over_production": round(
                statistics.median(a / b for a, b in zip(seconds, times["production"], strict=True)), 3
            ),
            "peak_mib": round(peaks[name] / MIB, 2),
            "rounds": rounds,
        }
        for name, seconds in times.items()
    ]


def held(context: SequenceContext, tokens: int) -> dict[str, Any]:
    """Return the memory of a rank of a ring: its own rows, and the peak of a step without them."""
    context.begin(tokens)
    step = step_of(context, "ring", tokens, MEMORY_BRANCHES)
    step()
    own = tokens // context.sequence_parallel_size * HEADS * HEAD_DIM * 4
    longest, rate = MEMORY_BRANCHES["segment_lengths"][-1], MEMORY_BRANCHES["dilation_rates"][-1]
    rows = longest // rate
    return {
        "queries_mib": round(own / MIB, 2),
        "keys_mib": round(2 * own / MIB, 2),
        "peak_mib": round(most(allocated(step)) / MIB, 2),
        # of the longest branch, were they held: this rank's rows by all of the segment's
        "scores_mib": round(HEADS * rows // context.sequence_parallel_size * rows * 4 / MIB, 2),
    }


def measure(ranks: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = on_ranks(ranks, work, ranks, tokens, rounds)
    return rows


def table(result: dict[str, Any]) -> str:
    cases = sorted({(row["ranks"], row["tokens"]) for row in result["rows"]})
    heads = [f"{ranks} rank{'s' * (ranks > 1)}, {tokens:,} tokens" for ranks, tokens in cases]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(cases) + 1) + "|"]
    by_name = {(row["preset"], row["ranks"], row["tokens"]): row for row in result["rows"]}
    for name in PRESETS:
        rows = [by_name[name, *case] for case in cases]
        cells = (
            f"{r['tokens_per_second']:,} tokens/s, {r['over_production']:.2f}; {r['peak_mib']:,.0f} MiB" for r in rows
        )
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines += ["", "| ranks | queries | keys and values | peak of a step beyond them | scores, were they held |"]
    lines += ["|---" * 5 + "|"]
    lines += [
        f"| {r['ranks']} | {r['queries_mib']:.1f} MiB | {r['keys_mib']:.1f} MiB | {r['peak_mib']:.1f} MiB | "
        f"{r['scores_mib']:,.0f} MiB |"
        for r in result["memory"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the committed result")
    parser.add_argument("--case", type=int, nargs=2, help="ranks and tokens, measured again")
    parser.add_argument("--memory", action="store_true", help="the memory of a ring alone, measured again")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    if not options.table:
        known: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": [], "memory": []}
        cases = [(options.case[0], options.case[1])] if options.case else [] if options.memory else CASES
        for case in cases:
            rows = [row for row in known["rows"] if (row["ranks"], row["tokens"]) != case]
            known["rows"] = [*rows, *measure(case[0], case[1], options.rounds)]
        if options.memory or not options.case:
            known["memory"] = [row for n in MEMORY_RANKS for row in measure(n, MEMORY_TOKENS, 0)]
        RESULT.write_text(json.dumps({**known, "machine": described("cpu")}, indent=1) + "\n")
    print(table(json.loads(RESULT.read_text())) if RESULT.exists() else "not measured")


if __name__ == "__main__":
    main()
