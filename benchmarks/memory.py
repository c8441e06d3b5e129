"""Measure the peak memory of a step: of a LongNet against the length, of its loss, and of the ranks of a ring.

    python benchmarks/memory.py
    python benchmarks/memory.py --table            # the committed result, as the pages show it
    python benchmarks/memory.py --ring             # measures only the ranks of a ring, and keeps the other rows

Peaks are those of torch's allocator, without what was allocated before: they include gradients, not parameters.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from machine import allocated, described
from ranks import on_ranks

from lightning_longnet import LongNet, LongNetConfig, Pattern, SequenceShard, attend, chunked_cross_entropy

WIDTH, VOCABULARY = 256, 50_257
LOSSES = [("plain", 8192), ("chunked", 8192), ("chunked", 65536)]
DIM, LAYERS, HEADS = 128, 4, 4
LENGTHS = [4096, 8192, 16384, 32768]
SAVINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "all but attention": {"recompute": "all but attention"},
    "everything": {"recompute": "everything"},
    "all but attention, feed-forward in chunks": {"recompute": "all but attention", "feed_forward_chunk": 1024},
}
RANKS, OF_EACH, OF_HEADS, HEAD_DIM = [2, 3, 4, 5, 8], 1024, 4, 32
RINGS = {
    "dilated, the longest segment over 8 ranks": Pattern.dilated((512, 2048, 8192), (1, 4, 16), is_causal=True),
    "dense": Pattern.dense(),
}
RESULT = Path(__file__).parent / "results" / "memory-cpu.json"


def loss_row(kind: str, tokens: int) -> dict[str, Any]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH).mul_(WIDTH**-0.5).requires_grad_()
    labels = torch.randint(VOCABULARY, (tokens,))

    def call() -> None:
        hidden.grad = weight.grad = None
        if kind == "plain":
            F.cross_entropy(F.linear(hidden, weight), labels).backward()
        else:
            loss_sum, count = chunked_cross_entropy(hidden, weight, labels)
            (loss_sum / count).backward()

    begin = perf_counter()
    peak = allocated(call)
    seconds = perf_counter() - begin
    return {"loss": kind, "tokens": tokens, "peak_mib": round(peak / 2**20, 1), "seconds": round(seconds, 2)}


def model_row(name: str, savings: dict[str, Any], tokens: int) -> dict[str, Any]:
    torch.manual_seed(0)
    pattern = Pattern.dilated((512, 2048, 8192, 32768), (1, 4, 16, 64), is_causal=True)
    model = LongNet(LongNetConfig(pattern, dim=DIM, layers=LAYERS, heads=HEADS, **savings))
    ids = torch.randint(256, (1, tokens + 1))

    def call() -> None:
        model.zero_grad()
        loss_sum, count = model(ids[:, :-1], ids[:, 1:])
        (loss_sum / count).backward()

    call()
    begin = perf_counter()
    peak = allocated(call)
    seconds = perf_counter() - begin
    return {
        "recompute": name,
        "tokens": tokens,
        "peak_mib": round(peak / 2**20, 1),
        # in tensors of (tokens, dim): what each layer would hold of its input alone is one
        "tensors": round(peak / (tokens * DIM * 4), 1),
        "seconds": round(seconds, 2),
    }


def ring_row(name: str, exchange: str, ranks: int) -> dict[str, Any]:
    peaks: list[int] = on_ranks(ranks, ring_peaks, name, exchange)
    return {"pattern": name, "exchange": exchange, "ranks": ranks, "peak_mib": round(max(peaks) / 2**20, 2)}


def ring_peaks(name: str, exchange: str) -> list[int]:
    """Return the peak of a step on each rank, without its queries, keys, values and the incoming gradient."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    shard = SequenceShard(group, OF_EACH)
    q, k, v, grad = (torch.randn(1, OF_EACH, OF_HEADS, HEAD_DIM) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def call() -> None:
        attend(q, k, v, RINGS[name], shard=shard, exchange=exchange).backward(grad)  # type: ignore[call-overload]

    call()
    for x in leaves:
        x.grad = None
    peaks = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, allocated(call))
    return peaks


def table(result: dict[str, Any]) -> str:
    lengths = sorted({row["tokens"] for row in result["model"]})
    lines = [
        "| computed again | " + " | ".join(f"{n:,} tokens" for n in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for name in dict.fromkeys(row["recompute"] for row in result["model"]):
        rows = {row["tokens"]: row for row in result["model"] if row["recompute"] == name}
        cells = (f"{rows[n]['peak_mib']:,.0f} MiB, {rows[n]['tensors']:.0f}" for n in lengths)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| loss | tokens | peak | seconds |", "|---|---|---|---|"]
    lines += [
        f"| {row['loss']} | {row['tokens']:,} | {row['peak_mib']:,.0f} MiB | {row['seconds']:.1f} |"
        for row in result["loss"]
    ]
    lines += ["", "| pattern | exchange | " + " | ".join(f"{n} ranks" for n in RANKS) + " |"]
    lines += ["|---" * (len(RANKS) + 2) + "|"]
    for name, exchange in dict.fromkeys((row["pattern"], row["exchange"]) for row in result["ring"]):
        peaks = [row["peak_mib"] for row in result["ring"] if (row["pattern"], row["exchange"]) == (name, exchange)]
        lines.append(f"| {name} | {exchange} | " + " | ".join(f"{peak:.1f} MiB" for peak in peaks) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the committed result")
    parser.add_argument("--ring", action="store_true", help="measure the ranks of a ring alone")
    options = parser.parse_args()
    rings = [(name, exchange, n) for name in RINGS for exchange in ("ring", "gather") for n in RANKS]
    if options.ring:
        kept = json.loads(RESULT.read_text()) | {"ring": [ring_row(*each) for each in rings]}
        RESULT.write_text(json.dumps(kept, indent=1) + "\n")
    elif not options.table:
        result: dict[str, Any] = {
            "machine": described("cpu"),
            "width": WIDTH,
            "vocabulary": VOCABULARY,
            "dim": DIM,
            "layers": LAYERS,
            "heads": HEADS,
            "loss": [loss_row(*each) for each in LOSSES],
            "model": [model_row(name, savings, n) for n in LENGTHS for name, savings in SAVINGS.items()],
            "ring": [ring_row(*each) for each in rings],
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(table(json.loads(RESULT.read_text())) if RESULT.exists() else "not measured")


if __name__ == "__main__":
    main()
