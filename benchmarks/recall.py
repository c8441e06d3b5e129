"""Train recall over a distance that is longer than the part of a sequence on one rank.

    python benchmarks/recall.py
    python benchmarks/recall.py --table            # the committed result, as the pages show it
    python benchmarks/recall.py --plot-only        # draws the committed result again

The same small model is trained twice on two processes that share every sequence, with `ring_sequence_parallel`: once
with dilated segments up to the whole sequence, once only with local segments.  Answers are farther back than the tokens
of a process, so a model can only get them through the exchange.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import lightning as L
from figure import draw_recall
from machine import described
from ranks import on_ranks

from lightning_longnet import LongNetConfig, LongNetModule, LongRangeData, Pattern, sequence_context, sequence_plan
from lightning_longnet.strategies import RingSequenceParallelStrategy

if TYPE_CHECKING:
    from torch import Tensor

RANKS, TOKENS, DISTANCE, ITEMS, STEPS = 2, 128, 88, 8, 800
PATTERNS = {
    "32 / 1, 128 / 4: dilated, to the whole sequence": Pattern.dilated((32, 128), (1, 4), is_causal=True),
    "32 / 1, 64 / 1: local segments alone": Pattern.dilated((32, 64), (1, 1), is_causal=True),
}
DIM, LAYERS, HEADS = 64, 2, 4
RESULT = Path(__file__).parent / "results" / "recall-cpu.json"


class Recall(LongNetModule):
    """A LongNetModule that also logs the accuracy of the answers."""

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        super().validation_step(batch, index)
        asked = batch["labels"] != -100
        right = (self(batch["input_ids"]).argmax(-1) == batch["labels"]) & asked
        accuracy = sequence_context(self).token_mean(right.sum().double(), asked.sum())
        self.log("val/accuracy", accuracy, batch_size=len(asked))  # as many are asked in each batch


class Curve(L.Callback):
    """A callback that records the accuracy at each validation."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.points.append((trainer.global_step, round(trainer.callback_metrics["val/accuracy"].item(), 4)))


def train(name: str, steps: int) -> dict[str, Any]:
    data = LongRangeData("copy", TOKENS, DISTANCE, batch_size=32, items=ITEMS, validation_samples=256)
    L.seed_everything(0)
    config = LongNetConfig(PATTERNS[name], vocab_size=data.vocab_size, dim=DIM, layers=LAYERS, heads=HEADS)
    module = Recall(config, learning_rate=3e-3, warmup_steps=50, weight_decay=0.01)
    curve = Curve()
    trainer = L.Trainer(
        strategy=RingSequenceParallelStrategy(RANKS, "ddp"),
        accelerator="cpu",
        devices=RANKS,
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=100,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[curve],
    )
    begin = perf_counter()
    trainer.fit(module, datamodule=data)
    return {
        "pattern": name,
        "accuracy": curve.points[-1][1],
        "chance": data.chance,
        "curve": curve.points,
        "seconds": round(perf_counter() - begin, 1),
        "sent_bytes": sent_bytes(PATTERNS[name]),
    }


def sent_bytes(pattern: Pattern) -> int:
    """Return the bytes that all ranks send in a layer, forward and backward, for one row."""
    plan = sequence_plan(pattern, (TOKENS // RANKS,) * RANKS, heads=HEADS, head_dim=DIM // HEADS)
    return sum(rank.sent_bytes for rank in plan.volumes)


def work(steps: int) -> list[dict[str, Any]]:
    return [train(name, steps) for name in PATTERNS]


def measured(steps: int) -> dict[str, Any]:
    rows = on_ranks(RANKS, work, steps)
    options = {"ranks": RANKS, "tokens": TOKENS, "distance": DISTANCE, "items": ITEMS, "steps": steps}
    return {"machine": described("cpu"), **options, "rows": rows}


def table(result: dict[str, Any]) -> str:
    lines = ["| segments | right answers | by chance | sent in a layer and row | trained in |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['pattern']} | {row['accuracy']:.1%} | {row['chance']:.1%} | {row['sent_bytes'] / 1024:,.0f} KiB | "
        f"{row['seconds']:.0f} s |"
        for row in result["rows"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--table", action="store_true", help="print the committed result")
    parser.add_argument("--plot-only", action="store_true", help="draw the committed result again, measure nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        if not arguments.plot_only:
            RESULT.write_text(json.dumps(measured(arguments.steps), indent=1) + "\n")
        draw_recall(json.loads(RESULT.read_text()), RESULT.with_suffix(".png"))
    print(table(json.loads(RESULT.read_text())) if RESULT.exists() else "not measured")


if __name__ == "__main__":
    main()
