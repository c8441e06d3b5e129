"""Folders as runs leave them."""

import csv
import json
import math

from lightning_longnet import Pattern, sequence_plan

PATTERN = Pattern.dilated((256, 1024, 4096), (1, 2, 4), is_causal=True)
CONFIG = """\
seed_everything: 0
trainer:
  max_steps: 200
  accelerator: cpu
model:
  dim: 128
  heads: 4
  pattern:
    branches:
    - segment_length: 256
      dilation_rate: 1
      is_causal: true
    - segment_length: 4096
      dilation_rate: {rate}
      is_causal: true
data:
  tokens: 4096
"""


def rows(many=20, slope=1.0, ranks=2):
    """Return rows as the monitors and a module log them: a row for each logging step, and rows of validations."""
    logged = []
    for i in range(many):
        step = 10 * i + 9
        bits = 2.5 + 4 * math.exp(-slope * i / 6)
        logged.append(
            {
                "step": step,
                "epoch": 0,
                "train/bits_per_byte": bits + 0.1 * math.sin(i),
                "train/loss": bits * math.log(2),
                "throughput/tokens_per_second": 41_000 + 900 * math.sin(2 * i),
                "throughput/step_seconds_mean": 0.1,
                "throughput/step_seconds_p50": 0.099,
                "throughput/step_seconds_p90": 0.12 + 0.01 * math.sin(i),
                "throughput/mfu": 0.31,
                "throughput/hfu": 0.36,
                "throughput/tokens": 4096 * (step + 1),
                "memory/peak_gib_max": 0.61,
                "memory/peak_gib_min": 0.52,
                **{f"memory/{kind}_gib": 0.003 for kind in ("parameters", "gradients", "optimizer", "exchange")},
                "memory/activations_gib": 0.16,
                "exchange/sent_bytes": 4 * 2**20,
                "exchange/predicted_bytes": 4 * 2**20,
                "exchange/flight_seconds": 0.02,
                "exchange/waited_seconds": 0.004,
                "exchange/hidden_share": 0.8,
                "lr-AdamW": 1e-3 * (1 - i / many),
            }
        )
        if i % 5 == 4:
            logged.append({"step": step, "epoch": 0, "val/bits_per_byte": bits + 0.2, "val/loss": bits * 0.7})
    return logged


def record(ranks=2, tokens=4096, placement="contiguous"):
    lengths = tuple(tokens // ranks for _ in range(ranks))
    plan = sequence_plan(PATTERN, lengths, 4, placement=placement, head_dim=32)
    where = plan.layout.placement
    return {
        "status": "finished",
        "started": "2026-11-20T10:00:00+00:00",
        "seconds": 83.4,
        "module": "ByteModel",
        "parameters": 862_208,
        "steps": 200,
        "ranks": ranks,
        "data_parallel": 1,
        "sequence_parallel": ranks,
        "strategy": "fsdp2",
        "precision": "32-true",
        "device": "cpu",
        "versions": {},
        "tokens": tokens,
        "samples": 1,
        "final": {"val/perplexity": 7.25},
        "by_rank": {"peak": [2**29 + 2**26 * rank for rank in range(ranks)]},
        "attention": [
            {
                "layers": 4,
                "heads": 4,
                "kv_heads": 4,
                "pattern": PATTERN.to_dict(),
                "plan": {
                    "placement": placement,
                    "stretches": [[[s.begin, s.end] for s in where.chunks(rank)] for rank in range(ranks)],
                    "exchanges": plan.schedule.exchanges,
                    "why": plan.schedule.why,
                    "pairs": plan.pairs,
                    "received": plan.received,
                    "sent": [each.sent_bytes for each in plan.volumes],
                },
            }
        ],
    }


def leave(folder, slope=1.0, ranks=2, rate=4, placement="contiguous", is_ours=True):
    folder.mkdir(parents=True)
    logged = rows(slope=slope)
    keys = list(dict.fromkeys(key for row in logged for key in row))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(logged)
    if is_ours:
        (folder / "config.yaml").write_text(CONFIG.format(rate=rate))
        (folder / "run.json").write_text(json.dumps(record(ranks, placement=placement)))
    return folder
