"""Measure tiles of the kernel "triton" on the GPU of this machine, and write the fastest to the kernel's table.

    python benchmarks/tune_triton.py                   # some minutes on an H100
    python benchmarks/tune_triton.py --tokens 65536 --rounds 20

The pattern is LongNet's, 2k to 32k at rates 1 to 16, causal, in bfloat16.  A tile whose program spills registers, or
does not fit the device, is left out.  The times of the tiles that were left stay in the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from machine import gpu
from triton_programs import FORMS, device_of, resources

from lightning_longnet import Pattern, attend
from lightning_longnet.attention.kernels.triton.tiles import TABLE, Tile, table

if TYPE_CHECKING:
    from collections.abc import Callable

LONGNET = Pattern.dilated((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16), is_causal=True)
HEADS = {64: 16, 128: 8, 256: 4}  # of each width, so that all have as many numbers
TILES = [Tile(*sizes) for sizes in product((32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3))]


def fitting(program: str, width: int, capability: int) -> list[Tile]:
    """Return the tiles whose programs spill no registers, and take no more shared memory than the device has."""
    from triton.runtime.driver import driver

    shared = driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]
    kept = []
    with device_of(capability):
        for tile in TILES:
            found = resources(program, width, tile, FORMS["weighted"], torch.bfloat16)
            if found.stack_bytes == 0 and found.shared_bytes <= shared:
                kept.append(tile)
    return kept


def milliseconds(call: Callable[[], Any], rounds: int) -> float:
    """Return the median time of a call on the device, after a first one that compiles."""
    call()
    times: list[float] = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def timed(program: str, width: int, tokens: int, rounds: int) -> float:
    """Return the time of a forward, or of a backward, in which the program runs with its tile of the table."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = 4, 1, tokens, HEADS[width], width
    q, k, v, grad = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16).unbind()
    if program == "forward":
        return milliseconds(lambda: attend(q, k, v, LONGNET, kernel="triton"), rounds)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = attend(q, k, v, LONGNET, kernel="triton")
    return milliseconds(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), rounds)


def tuned(tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row of the table for each program and width, with its time."""
    rows = []
    capability = int("{}{}".format(*torch.cuda.get_device_capability()))
    for program, width in table():
        times = {}
        for tile in fitting(program, width, capability):
            table()[program, width] = tile
            times[tile] = timed(program, width, tokens, rounds)
        best = min(times, key=times.__getitem__)
        table()[program, width] = best
        rows.append({"kernel": program, "width": width, **best._asdict(), "ms": round(times[best], 3)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_triton.py: torch finds no CUDA device here, and tiles are measured on one")
    rows = tuned(arguments.tokens, arguments.rounds)
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    TABLE.write_text(f'{{\n  "measured_on": {json.dumps(gpu())},\n  "rows": [\n{lines}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
