"""Measure what attention takes over what it could take, each ratio out of interleaved rounds, on one screen.

    python benchmarks/ratios.py                    # writes benchmarks/results/ratios-cpu.json
    python benchmarks/ratios.py --clock wall       # on a quiet machine; by default the time of the CPU
    python benchmarks/ratios.py --table            # the committed result

The limit of dilated attention is a kernel that computes each distinct pair once, at the rate of torch's own operator
for a full rectangle in the same run, with the faster library for products.  Threads that wait count as time of the
CPU, so there is one unless the clock is that on the wall.  The rows of ranks and of a busy core are always those of
the clock on the wall.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import host_time
import peers
import scheme
import steps
import torch
from machine import described
from packed import HEAD_DIM, HEADS, packed_calls, step, tensors
from ranks import on_ranks

from lightning_longnet import Pattern, attend
from lightning_longnet.attention.kernels.products import routed_products
from lightning_longnet.attention.parallel.exchange import Sizes
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.parallel.rank_blocks import Layout, rank_blocks
from lightning_longnet.attention.parallel.routes import route
from lightning_longnet.attention.parallel.schedule import schedule
from lightning_longnet.attention.plan.blocks import plan

if TYPE_CHECKING:
    from collections.abc import Callable

RECTANGLE = 2048
FIVE = [2048, 4096, 8192, 16384, 32768], [1, 2, 4, 8, 16]
RESULT = Path(__file__).parent / "results" / "ratios-cpu.json"
CLOCKS = {"cpu": process_time, "wall": perf_counter}
# the greatest ratio that each kind of row is to reach
GOALS = {"attend over SDPA, 128": 1.5, "attend over SDPA, 512": 1.1, "attend over SDPA, 2,048": 1.02}
LIMIT_GOAL, PACKED_GOAL, PLAN_SECONDS = 1.15, 1.1, 0.3
DENSE_STEP_GOAL, STEP_GOALS = 1.05, {512: 1.0, 2048: 1 / 1.3, 8192: 1 / 3.5}
RANKS_GOAL, BUSY_GOAL = 1 / 1.9, 1 / 0.9
RANKED_TOKENS, BUSY_TOKENS = 16384, 8192


def ratio(own: Callable[[], None], other: Callable[[], None], options: argparse.Namespace) -> tuple[float, float]:
    """Return the median ratio of the times of two functions over interleaved rounds, and the median time of `own`."""
    clock, times = CLOCKS[options.clock], []
    for run in (own, other):
        run()
    for _ in range(options.rounds):
        pair = []
        for run in (own, other):
            begin = clock()
            run()
            pair.append(clock() - begin)
        times.append(pair)
    return statistics.median(a / b for a, b in times), statistics.median(a for a, _ in times)


def repeated(function: Callable[[], None], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            function()

    return run


def over_sdpa(length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of dense causal attention beside torch's own, on one thread."""
    inputs, grad = tensors(1, length)
    pattern, times = Pattern.dense(is_causal=True), max(1, 4096 // length)
    own, other = (partial(step, call, inputs, grad) for call in (partial(attend, pattern=pattern), peers.dense(True)))
    name = f"attend over SDPA, {length:,}"
    found, _ = ratio(repeated(own, times), repeated(other, times), options)
    return {"name": name, "ratio": round(found, 3), "goal": GOALS[name]}


def over_limit(length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of five causal branches beside distinct pairs at the rate of a full rectangle."""
    inputs, grad = tensors(1, length)
    full, full_grad = tensors(1, RECTANGLE)
    pattern = Pattern.dilated(*FIVE, is_causal=True)
    distinct = plan(Pattern(pattern.branches, "set"), HEADS, HEADS, (0, length)).pairs
    scale = distinct / (RECTANGLE**2 * HEADS)
    own = partial(step, partial(attend, pattern=pattern), inputs, grad)

    def rectangle() -> None:
        with routed_products():  # by the faster library
            step(peers.dense(False), full, full_grad)

    found, _ = ratio(own, rectangle, options)
    return {"name": f"five branches over the limit, {length:,}", "ratio": round(found / scale, 3), "goal": LIMIT_GOAL}


def packed(batch: int, length: int, documents: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of packed rows, each with other documents, beside the same documents one after the other."""
    calls = packed_calls(batch, length, documents)
    found, _ = ratio(calls.own, calls.alone, options)
    name = f"packed over SDPA of each document, {batch} x {length:,}, {documents:,} documents a row"
    return {"name": name, "ratio": round(found, 3), "goal": PACKED_GOAL}


def over_nanogpt(length: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of a training step with a dense pattern, and with five branches, beside a plain GPT's.

    Their rounds are fewer where a step takes seconds.
    """
    times, rows = max(1, 2048 // length), []
    options = argparse.Namespace(clock=options.clock, rounds=min(options.rounds, 2 if length > 2048 else 5))
    cases = {"dense": (Pattern.dense(is_causal=True), DENSE_STEP_GOAL)} if length <= 2048 else {}
    cases |= {"five branches": (Pattern.dilated(*FIVE, is_causal=True), STEP_GOALS[length])}
    plain = steps.plain_step(length)
    for name, (pattern, goal) in cases.items():
        own = steps.longnet_step(pattern, length)
        found, _ = ratio(repeated(own, times), repeated(plain, times), options)
        title = f"a step over nanoGPT, {name}, {length:,}"
        rows.append({"name": title, "ratio": round(found, 3), "goal": round(goal, 3)})
    return rows


def over_one_rank() -> dict[str, Any]:
    """Return the row of a step on two ranks of one thread beside that on one."""
    found = on_ranks(2, steps.over_one_rank, Pattern.dilated(*FIVE, is_causal=True), RANKED_TOKENS, 2)
    name = f"a step on two ranks over one, wall, {RANKED_TOKENS:,}"
    return {"name": name, "ratio": round(found, 3), "goal": round(RANKS_GOAL, 3)}


def beside_a_busy_core(options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of five branches over torchscale's scheme beside a process that computes, over that without it."""
    inputs, grad = tensors(1, BUSY_TOKENS)
    pattern = Pattern.dilated(*FIVE, is_causal=True)
    own = partial(step, partial(attend, pattern=pattern), inputs, grad)
    other = partial(step, scheme.torchscale("sdpa", *FIVE), inputs, grad)
    options = argparse.Namespace(clock="wall", rounds=options.rounds)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    quiet, _ = ratio(own, other, options)
    spinning = get_context("spawn").Process(target=_spin, daemon=True)
    spinning.start()
    try:
        busy, _ = ratio(own, other, options)
    finally:
        spinning.terminate()
        spinning.join()
        torch.set_num_threads(threads)
    name = f"five branches over torchscale's scheme, beside a busy core over quiet, wall, {BUSY_TOKENS:,}"
    return {"name": name, "ratio": round(busy / quiet, 3), "goal": round(BUSY_GOAL, 3)}


def _spin() -> None:
    while True:
        pass


def planned(documents: int, placement: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of the seconds of the CPU in which a rank plans a layout, the median over other documents."""
    tokens, ranks, seconds = 2**20, 1024, []
    for seed in range(options.rounds):
        inner = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(seed))[: documents - 1] + 1
        cuts = (0, *inner.sort().values.tolist(), tokens)
        where = Placement.even(tokens, ranks, "zigzag" if placement == "zigzag" else "contiguous")
        layout = Layout(Pattern.dilated(*FIVE, is_causal=True), 32, 8, cuts, where)
        rank_blocks.cache_clear()
        begin = process_time()
        chosen = schedule(layout, "auto", Sizes(1, HEAD_DIM, HEAD_DIM, 2, 4))
        for round_ in route(layout, ranks // 2 - 1, chosen.exchanges).rounds:
            round_.indices()
        seconds.append(process_time() - begin)
    name = f"seconds to plan {tokens:,} tokens on {ranks:,} ranks, {documents:,} documents, {placement}"
    return {"name": name, "ratio": round(statistics.median(seconds), 3), "goal": PLAN_SECONDS}


def table(result: dict[str, Any]) -> str:
    rows = result["rows"]
    wide = max(len(row["name"]) for row in rows)
    return "\n".join(f"{row['name']:<{wide}}  {row['ratio']:8.3f}   goal {row['goal']}" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="the time of the CPU, or that of a clock")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT, help="where to write the JSON")
    parser.add_argument("--table", action="store_true", help="print the result at --out, measure nothing")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.out.read_text())) if options.out.exists() else "not measured")
        return
    result: dict[str, Any] = {"machine": described("cpu") | {"heads": HEADS, "head_dim": HEAD_DIM}}
    result |= {"clock": options.clock, "rounds": options.rounds}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = [over_sdpa(length, options) for length in (128, 512, 2048)]
    rows += [packed(batch, 4096, many, options) for batch, many in ((1, 10), (1, 100), (8, 10), (8, 100), (8, 1000))]
    rows += [row for length in STEP_GOALS for row in over_nanogpt(length, options)]
    rows += [over_one_rank(), beside_a_busy_core(options)]
    torch.set_num_threads(threads if options.clock == "wall" else 1)
    rows += [over_limit(length, options) for length in (8192, 32768)]
    rows += [planned(many, placement, options) for many in (1, 1000) for placement in ("contiguous", "zigzag")]
    torch.set_num_threads(1)
    rows += host_time.rows()
    result["rows"] = rows
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
