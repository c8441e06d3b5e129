"""Compute the bytes that each of up to 16,384 ranks would send, in one process without a process group.

python benchmarks/scaling.py
python benchmarks/scaling.py --table            # the committed result, as the pages show it
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter
from typing import Any

from lightning_longnet import Pattern
from lightning_longnet.attention.parallel.exchange import Sizes
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.parallel.rank_blocks import Layout
from lightning_longnet.attention.parallel.schedule import schedule

HEADS, SIZES = 16, Sizes(batch=1, head_dim=64, value_dim=64, itemsize=2, wide_itemsize=4)
PATTERNS = {
    "5 branches to 32,768": ([2048 << i for i in range(5)], [1 << i for i in range(5)]),
    "10 branches to 1,048,576": ([2048 << i for i in range(10)], [1 << i for i in range(10)]),
}
CASES = [(2**20, 8), (2**20, 64), (2**20, 1024), (2**24, 1024), (2**30, 16384)]
RESULT = Path(__file__).parent / "results" / "scaling.json"


def measure(name: str, tokens: int, ranks: int) -> dict[str, Any]:
    begin = perf_counter()
    layout = Layout(
        Pattern.dilated(*PATTERNS[name], is_causal=True),
        HEADS,
        HEADS,
        (0, tokens),
        Placement.even(tokens, ranks),
    )
    chosen = schedule(layout, "auto", SIZES)
    watched = sorted({0, ranks // 2, ranks - 1})
    most = max(chosen.plan(layout).volume(rank, SIZES).sent_bytes for rank in watched)
    every_key = (tokens - tokens // ranks) * 2 * HEADS * SIZES.head_dim * (SIZES.itemsize + SIZES.wide_itemsize)
    return {
        "pattern": name,
        "tokens": tokens,
        "ranks": ranks,
        "exchange": " + ".join(dict.fromkeys(chosen.exchanges)),
        "sent_mib": round(most / 2**20, 2),
        "every_key_mib": round(every_key / 2**20, 1),
        "seconds": round(perf_counter() - begin, 2),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| tokens | ranks | pattern | exchange | MiB a rank | all keys to all ranks, MiB | planned in |",
        "|---" * 7 + "|",
    ]
    lines += [
        f"| {r['tokens']:,} | {r['ranks']:,} | {r['pattern']} | {r['exchange']} | {r['sent_mib']:,.1f} | "
        f"{r['every_key_mib']:,.0f} | {r['seconds']:.1f} s |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the table of the result at --out, measure nothing")
    options = parser.parse_args()
    if not options.table:
        rows = [measure(name, *case) for name in PATTERNS for case in CASES]
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(json.loads(options.out.read_text())) if options.out.exists() else "not measured")


if __name__ == "__main__":
    main()
