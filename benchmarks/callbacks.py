"""Measure the cost of the callbacks: the time inside their hooks, as a share of the time of a step.

    python benchmarks/callbacks.py
    python benchmarks/callbacks.py --table            # the committed result

Two processes of one thread each train the model of the quickstart with all monitors, the guard, the progress line and
the CSVLogger, which logs every tenth step.  Each hook of each callback is timed, including the time in which it waits
for other ranks.  Alternating runs without the callbacks show whether the whole step takes longer.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections import defaultdict
from functools import wraps
from pathlib import Path
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from machine import described, run
from ranks import on_ranks
from torch.utils.data import DataLoader

from lightning_longnet import LongNet, LongNetConfig, Pattern, sequence_context
from lightning_longnet.callbacks import (
    CommunicationMonitor,
    MemoryMonitor,
    NonFiniteGuard,
    TokenThroughput,
    TrainingProgress,
)
from lightning_longnet.strategies import RingSequenceParallelStrategy

if TYPE_CHECKING:
    from torch import Tensor

RANKS, TOKENS, STEPS, LOGGED, SKIPPED = 2, 2048, 30, 10, 5
RESULT = Path(__file__).parent / "results" / "callbacks-cpu.json"


class Model(L.LightningModule):
    """A LightningModule with the model of the quickstart."""

    def __init__(self) -> None:
        super().__init__()
        pattern = Pattern.dilated((256, 1024, 2048), (1, 2, 4), is_causal=True)
        self.model = LongNet(LongNetConfig(pattern, dim=128, layers=4, heads=4))

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        nats, count = self.model(batch["input_ids"], batch["labels"])
        loss = sequence_context(self).token_mean(nats, count)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Timed(L.Callback):
    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.stamps.append(perf_counter())


def clocked(callback: L.Callback, spent: dict[str, list[tuple[float, float]]]) -> L.Callback:
    """Wrap the training hooks of a callback, so that each call appends its wall time and its CPU time to `spent`."""
    name = type(callback).__name__
    for hook in ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end"):
        inner = getattr(callback, hook)

        def timed(*arguments: Any, inner: Any = inner) -> None:
            begin = perf_counter(), thread_time()
            inner(*arguments)
            spent[name].append((perf_counter() - begin[0], thread_time() - begin[1]))

        setattr(callback, hook, wraps(inner)(timed))
    return callback


def train(with_callbacks: bool) -> tuple[float, dict[str, tuple[float, ...]]]:
    """Train, and return the median seconds of a step, and the mean wall and CPU seconds a step of each callback."""
    spent: dict[str, list[tuple[float, float]]] = defaultdict(list)
    timed, watching = Timed(), []
    if with_callbacks:
        made = (TokenThroughput(), MemoryMonitor(), CommunicationMonitor(), NonFiniteGuard(), TrainingProgress())
        watching = [clocked(each, spent) for each in made]
    torch.manual_seed(0)
    text = torch.randint(256, (STEPS + 1, TOKENS + 1))
    rows: Any = [{"input_ids": row[:-1], "labels": row[1:]} for row in text]
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=RANKS,
            strategy=RingSequenceParallelStrategy(),
            max_steps=STEPS,
            max_epochs=-1,
            log_every_n_steps=LOGGED,
            logger=CSVLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=with_callbacks,
            enable_model_summary=False,
            callbacks=[timed, *watching],
        )
        trainer.fit(Model(), DataLoader(rows, batch_size=1))
        dist.barrier()
    steps = [after - before for before, after in zip(timed.stamps, timed.stamps[1:], strict=False)]
    means = {name: tuple(sum(kind) / STEPS for kind in zip(*each, strict=True)) for name, each in spent.items()}
    return statistics.median(steps[SKIPPED:]), means


def work(rounds: int) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"with": [], "without": []}
    for turn in range(rounds):
        for kind in ("with", "without") if turn % 2 else ("without", "with"):
            found[kind].append(train(kind == "with"))
    return found


def measured(rounds: int) -> dict[str, Any]:
    load = os.getloadavg()[0]
    found = on_ranks(RANKS, work, rounds)
    return {
        "machine": described("cpu"),
        "load_before": round(load, 2),
        "rounds": rounds,
        "steps": STEPS,
        "logged_every": LOGGED,
        "step_seconds": {kind: [round(step, 5) for step, _ in turns] for kind, turns in found.items()},
        **{
            key: {name: [round(spent[name][i], 7) for _, spent in found["with"]] for name in found["with"][0][1]}
            for i, key in enumerate(("hook_seconds", "computing_seconds"))
        },
    }


def table(result: dict[str, Any]) -> str:
    step = statistics.median(result["step_seconds"]["without"])
    lines = ["| callback | in its hooks, a step | of the step | not waiting for the other rank |", "|---|---|---|---|"]
    total = [0.0, 0.0]
    for name, seconds in result["hook_seconds"].items():
        means = [statistics.median(each) for each in (seconds, result["computing_seconds"][name])]
        total = [a + b for a, b in zip(total, means, strict=True)]
        lines.append(f"| {name} | {means[0] * 1e3:.2f} ms | {means[0] / step:.2%} | {means[1] / step:.2%} |")
    lines.append(f"| all of them | {total[0] * 1e3:.2f} ms | {total[0] / step:.2%} | {total[1] / step:.2%} |")
    pairs = zip(result["step_seconds"]["with"], result["step_seconds"]["without"], strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    lines.append(f"| a step with them, over one without | | {ratio:.3f} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(__doc__, RESULT, measured, table, rounds=5)  # --rounds, --table
