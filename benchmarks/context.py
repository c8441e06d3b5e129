"""Measure perplexity against the length of the context at an equal number of tokens, as in the LongNet paper.

    python benchmarks/context.py
    python benchmarks/context.py --table            # the committed result, as the pages show it

For each length a byte-level model of the same size and initialisation is trained on the same number of bytes of the
sources of the standard library, in steps of the same number of tokens.  All models are evaluated on the same held-out
bytes, in sequences of the length that they were trained with.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from math import log
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from machine import described
from torch import Tensor

from lightning_longnet import LongNet, LongNetConfig, Pattern
from lightning_longnet.training.optimization import decay_groups, warmup_cosine

LENGTHS = [16, 64, 256, 1024]
DIM, LAYERS, HEADS = 96, 2, 4
STEP_TOKENS, STEPS, HELD_OUT = 4096, 400, 2**17
RESULT = Path(__file__).parent / "results" / "context-cpu.json"


def text() -> tuple[Tensor, Tensor]:
    """Return the bytes for training and the held-out bytes, which are from other files."""
    content = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        content += path.read_bytes()
    stream = torch.frombuffer(content, dtype=torch.uint8)
    return stream[:-HELD_OUT], stream[-HELD_OUT:]


def pattern(length: int) -> Pattern:
    """Return a pattern over the whole sequence: all near tokens, then every fourth, then every sixteenth."""
    branches = [(min(w, length), r) for w, r in ((128, 1), (512, 4), (2048, 16)) if w == 128 or w // 4 < length]
    return Pattern.dilated([w for w, _ in branches], [r for _, r in branches], is_causal=True)


def measure(length: int) -> dict[str, Any]:
    torch.manual_seed(0)
    train, held_out = text()
    config = LongNetConfig(pattern(length), dim=DIM, layers=LAYERS, heads=HEADS)
    model = LongNet(config)
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=2e-3, betas=(0.9, 0.95))
    schedule = warmup_cosine(optimizer, STEPS, STEPS // 10, 0.1)
    generator = torch.Generator().manual_seed(1)
    begin = perf_counter()
    for _ in range(STEPS):
        starts = torch.randint(len(train) - length - 1, (STEP_TOKENS // length, 1), generator=generator)
        rows = train[starts + torch.arange(length + 1)].long()
        loss_sum, count = model(rows[:, :-1], rows[:, 1:])
        (loss_sum / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = perf_counter() - begin
    total = tokens = 0.0
    model.eval()
    with torch.no_grad():
        # the same bytes for all lengths: a multiple of the longest length
        kept = (len(held_out) - 1) // max(LENGTHS) * max(LENGTHS)
        inputs, labels = (held_out[n : n + kept].long().view(-1, length) for n in (0, 1))
        for part in range(0, len(inputs), max(1, STEP_TOKENS // length)):
            some = slice(part, part + max(1, STEP_TOKENS // length))
            loss_sum, count = model(inputs[some], labels[some])
            total, tokens = total + loss_sum.item(), tokens + count.item()
    nats = total / tokens
    return {
        "context": length,
        "perplexity": round(torch.tensor(nats).exp().item(), 4),
        "bits_per_byte": round(nats / log(2), 4),
        "seconds": round(seconds, 1),
    }


def table(result: dict[str, Any]) -> str:
    rows = result["rows"]
    return "\n".join(
        [
            "| context, tokens | " + " | ".join(f"{row['context']:,}" for row in rows) + " |",
            "|---" * (len(rows) + 1) + "|",
            "| perplexity of a byte | " + " | ".join(f"{row['perplexity']:.2f}" for row in rows) + " |",
            "| bits per byte | " + " | ".join(f"{row['bits_per_byte']:.3f}" for row in rows) + " |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the committed result")
    if not parser.parse_args().table:
        rows = []
        for length in LENGTHS:
            rows.append(measure(length))
            print(json.dumps(rows[-1]), flush=True)
        result = {"machine": described("cpu"), "tokens": STEP_TOKENS * STEPS, "rows": rows}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(table(json.loads(RESULT.read_text())) if RESULT.exists() else "not measured")


if __name__ == "__main__":
    main()
