"""Measure attention to a tenth of the blocks of LongNet's segments, and flash attention to all of them.

    python benchmarks/block_sparse.py
    python benchmarks/block_sparse.py --table          # the committed result, as the pages show it

Each round runs all participants once, with the kernel that `attend` chooses.  Peaks are those of torch's allocator in a
forward and backward, without what was allocated before.  "scores" holds all scores of each segment; only its memory is
measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from machine import allocated, described

from lightning_longnet import Pattern, attend

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lightning_longnet.attention.pattern.sparsity import BlockKind

TOKENS, HEADS, HEAD_DIM = 8192, 8, 64
SEGMENTS, RATES = (2048, 4096), (1, 2)
RATIO, ROUNDS = 0.1, 5
KINDS: list[tuple[BlockKind, int]] = [
    ("local_window", 128),
    ("dilated_sparse", 128),
    ("global_local", 128),
    ("strided", 128),
    ("local_window", 64),
]
RESULT = Path(__file__).parent / "results" / "block_sparse-cpu.json"


def patterns(is_causal: bool) -> dict[str, Pattern]:
    whole = Pattern.dilated(SEGMENTS, RATES, is_causal)
    sparse = {
        f"{kind}, blocks of {size}": Pattern.block_sparse(kind, size, RATIO, within=whole) for kind, size in KINDS
    }
    return {"flash": whole} | sparse


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, TOKENS, HEADS, HEAD_DIM) for _ in range(4)]


def forward(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> None:
    with torch.no_grad():
        attend(q, k, v, pattern)


def both(call: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    call(*leaves).backward(grad)


def materialised(is_causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention over the same segments by matrix products, with the scores of both branches in memory."""
    outs, sums = [], []
    for width, rate in zip(SEGMENTS, RATES, strict=True):
        out, total = torch.zeros_like(v), v.new_full((*v.shape[:3], 1), -torch.inf)
        for head in range(HEADS):
            rows = [x[0, :, head].unflatten(0, (-1, width))[:, head % rate :: rate] for x in (q, k, v)]
            scores = rows[0] @ rows[1].mT * HEAD_DIM**-0.5
            if is_causal:
                scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
            at = (0, torch.arange(TOKENS).unflatten(0, (-1, width))[:, head % rate :: rate], head)
            out = out.index_put(tuple(map(torch.as_tensor, at)), scores.softmax(-1) @ rows[2])
            total = total.index_put(tuple(map(torch.as_tensor, at)), scores.logsumexp(-1, keepdim=True))
        outs.append(out)
        sums.append(total)
    shares = torch.stack(sums).softmax(0)
    return sum((share * out for share, out in zip(shares, outs, strict=True)), torch.zeros_like(v))


def measured(is_causal: bool) -> list[dict[str, Any]]:
    q, k, v, grad = tensors()
    known = patterns(is_causal)
    calls: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        name: (
            partial(forward, pattern, q, k, v),
            partial(both, partial(attend, pattern=pattern), q, k, v, grad),
        )
        for name, pattern in known.items()
    }
    times: dict[str, list[list[float]]] = {name: [[], []] for name in calls}
    for pair in calls.values():
        for call in pair:
            call()
    for _ in range(ROUNDS):
        for name, pair in calls.items():
            for n, call in enumerate(pair):
                begin = perf_counter()
                call()
                times[name][n].append(perf_counter() - begin)
    scores = partial(both, partial(materialised, is_causal), q, k, v, grad)
    rows: list[dict[str, Any]] = [
        {"name": "scores", "is_causal": is_causal, "peak_mib": round(allocated(scores) / 2**20, 1)}
    ]
    for name, pair in calls.items():
        row: dict[str, Any] = {"name": name, "is_causal": is_causal}
        for n, kind in enumerate(("forward", "both")):
            row[f"{kind}_ms"] = round(statistics.median(times[name][n]) * 1e3, 1)
            ratios = [a / b for a, b in zip(times["flash"][n], times[name][n], strict=True)]
            row[f"{kind}_speed"] = round(statistics.median(ratios), 2)
        rows.append(row | {"peak_mib": round(allocated(pair[1]) / 2**20, 1)})
    return rows


def table(result: dict[str, Any]) -> str:
    lines = ["| | forward | of flash | forward and backward | of flash | peak | of scores |", "|---" * 7 + "|"]
    for is_causal in (False, True):
        rows = [row for row in result["rows"] if row["is_causal"] == is_causal]
        for row in rows:
            named = row["name"] + ", causal" * is_causal
            times = " | | | |"
            if "both_ms" in row:
                cells = (
                    f" {row[f'{kind}_ms']:,.0f} ms | {row[f'{kind}_speed']:.1f} x " for kind in ("forward", "both")
                )
                times = "|".join(cells) + "|"
            share = row["peak_mib"] / rows[0]["peak_mib"]
            lines.append(f"| {named} |{times} {row['peak_mib']:,.0f} MiB | {share:.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the committed result")
    if not parser.parse_args().table:
        result = {
            "machine": described("cpu"),
            "tokens": TOKENS,
            "heads": HEADS,
            "head_dim": HEAD_DIM,
            "segment_lengths": SEGMENTS,
            "dilation_rates": RATES,
            "sparsity_ratio": RATIO,
            "rows": [row for is_causal in (False, True) for row in measured(is_causal)],
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(table(json.loads(RESULT.read_text())) if RESULT.exists() else "not measured")


if __name__ == "__main__":
    main()
