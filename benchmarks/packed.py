"""Measure packed rows of up to 4,000 documents, in batches of up to 64 rows, each row with other documents.

    python benchmarks/packed.py                    # writes benchmarks/results/packed-cpu.json
    python benchmarks/packed.py --memory kept      # measures one of the columns of memory again
    python benchmarks/packed.py --table            # the committed result, as the pages show it

A step of `attend`, forward and backward, takes turns with torch's own operator on each document, and with `attend` on
one row of the same length that is one document, in time of the CPU and on one thread.

`attend` returns large tensors where the operator on one document returns small ones.  The C library gives freed memory
of large tensors back to the system, which clears it page by page when it is used again.  With "kept", settings of glibc
have the process keep it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from functools import partial
from itertools import accumulate
from pathlib import Path
from time import process_time
from typing import TYPE_CHECKING, Any, NamedTuple

import peers
import torch
from machine import described

from lightning_longnet import Pattern, attend

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

HEADS, HEAD_DIM = 8, 64
CASES = [(1, 4096, many) for many in (10, 100, 1000, 4000)]
CASES += [(8, 4096, many) for many in (10, 100, 1000)] + [(64, 1024, many) for many in (10, 100)]
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}
SETTINGS: dict[str, dict[str, str]] = {"given back": {}, "kept": KEPT}
GOAL = 1.1
RESULT = Path(__file__).parent / "results" / "packed-cpu.json"


def tensors(batch: int, length: int) -> tuple[list[Tensor], Tensor]:
    """Return q, k and v as leaves, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, batch, length, HEADS, HEAD_DIM, generator=generator).unbind()
    return [x.clone().requires_grad_() for x in (q, k, v)], grad


def step(call: peers.Call, inputs: list[Tensor], grad: Tensor) -> None:
    for x in inputs:
        x.grad = None
    call(*inputs).backward(grad)


class PackedCalls(NamedTuple):
    """Steps of attention on packed rows, each row with other documents; dense and causal.

    Attributes:
        own: the step of `attend` on the rows.
        alone: the steps of torch's own operator on the same documents, one after the other.
        pairs: the visible pairs of a head in all documents.
    """

    own: Callable[[], None]
    alone: Callable[[], None]
    pairs: int


def packed_calls(batch: int, length: int, documents: int) -> PackedCalls:
    inputs, grad = tensors(batch, length)
    ids = torch.zeros(batch, length, dtype=torch.long)
    for row in ids:
        row[torch.randperm(length - 1)[: documents - 1] + 1] = 1
    ids = ids.cumsum(1)
    lengths = [row.bincount().tolist() for row in ids]

    def alone() -> None:
        for b, row in enumerate(lengths):
            for begin, many in zip(accumulate(row, initial=0), row, strict=False):
                some = slice(b, b + 1), slice(begin, begin + many)
                step(peers.dense(True), [x[some].detach().requires_grad_() for x in inputs], grad[some])

    own = partial(step, partial(attend, pattern=Pattern.dense(is_causal=True), documents=ids), inputs, grad)
    return PackedCalls(own, alone, sum(many * (many + 1) // 2 for row in lengths for many in row))


def measured(batch: int, length: int, documents: int, rounds: int) -> dict[str, Any]:
    """Return the row of one case: medians over the rounds."""
    calls = packed_calls(batch, length, documents)
    inputs, grad = tensors(1, length)
    unpacked = partial(step, partial(attend, pattern=Pattern.dense(is_causal=True)), inputs, grad)
    times = []
    for _ in range(rounds + 1):  # the first is a warm-up
        taken = []
        for run in (calls.own, calls.alone, unpacked):
            begin = process_time()
            run()
            taken.append(process_time() - begin)
        times.append(taken)
    share = calls.pairs / (length * (length + 1) // 2)
    return {
        "batch": batch,
        "length": length,
        "documents": documents,
        "seconds": round(statistics.median(own for own, _, _ in times[1:]), 4),
        "over_sdpa": round(statistics.median(own / alone for own, alone, _ in times[1:]), 3),
        "over_unpacked_pairs": round(statistics.median(own / unpacked / share for own, _, unpacked in times[1:]), 3),
    }


def table(result: dict[str, Any]) -> str:
    kinds = [kind for kind in SETTINGS if kind in result["memory"]]
    titles = ("over SDPA of each document", "a pair, over one of an unpacked row")
    columns = ["rows", "documents a row", *(f"{title}, memory {kind}" for title in titles for kind in kinds)]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for rows in zip(*(result["memory"][kind] for kind in kinds), strict=True):
        one = rows[0]
        cells = [f"{one['batch']} x {one['length']:,}", f"{one['documents']:,}"]
        cells += [f"{row[name]:.2f}" for name in ("over_sdpa", "over_unpacked_pairs") for row in rows]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", choices=SETTINGS, help="by default, both")
    parser.add_argument("--rows", action="store_true", help="print the rows of this process, as the benchmark calls it")
    parser.add_argument("--table", action="store_true", help="print the committed result")
    options = parser.parse_args()
    if options.rows:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        print(json.dumps([measured(*case, options.rounds) for case in CASES]))
        return
    if not options.table:
        result: dict[str, Any] = json.loads(RESULT.read_text()) if options.memory and RESULT.exists() else {}
        memory = result.setdefault("memory", {})
        for kind in [options.memory] if options.memory else SETTINGS:
            # the C library reads its settings when a process begins
            command = [sys.executable, __file__, "--rows", "--rounds", str(options.rounds)]
            done = subprocess.run(command, env=os.environ | SETTINGS[kind], stdout=subprocess.PIPE, check=True)
            memory[kind] = json.loads(done.stdout)
        machine = described("cpu") | {"heads": HEADS, "head_dim": HEAD_DIM}
        result |= {"machine": machine, "rounds": options.rounds, "goal": GOAL}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(table(json.loads(RESULT.read_text())) if RESULT.exists() else "not measured")


if __name__ == "__main__":
    main()
