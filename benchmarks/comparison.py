"""Measure the cost of comparing each batch over the ranks that share it: seconds, calls and bytes of a step.

    python benchmarks/comparison.py
    python benchmarks/comparison.py --table            # the committed result

Two processes of one thread each train the model of the quickstart on rows of its length.  The time inside of the
comparison is taken in each step: all of it, and the part in which this rank computes and does not wait for the other,
which it would wait for at the first layer otherwise.  Alternating runs without the comparison show whether a step takes
longer.
"""

from __future__ import annotations

import os
import statistics
from cProfile import Profile
from pathlib import Path
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.distributed as dist
from callbacks import Model, Timed
from machine import described, run
from ranks import on_ranks
from torch.utils.data import DataLoader

from lightning_longnet.strategies import RingSequenceParallelStrategy
from lightning_longnet.strategies.loaders import LoaderWatch

if TYPE_CHECKING:
    from collections.abc import Iterator

RANKS, TOKENS, STEPS, SKIPPED = 2, 2048, 30, 5
PARTS = ("_compare", "receive")
RESULT = Path(__file__).parent / "results" / "comparison-cpu.json"


class Rows(torch.utils.data.IterableDataset[Any]):
    """Rows of random bytes, the same on all ranks."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            row = torch.randint(256, (TOKENS + 1,), generator=generator)
            yield {"input_ids": row[:-1], "labels": row[1:]}


class Spent:
    """The seconds and the calls inside of the comparison."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.computing: list[float] = []
        self.profile = Profile()
        self._depth = 0

    def wrapped(self, inner: Any, is_counted: bool) -> Any:
        def timed(*arguments: Any) -> Any:
            if self._depth:  # one part calls the other
                return inner(*arguments)
            self._depth += 1
            begin = perf_counter(), thread_time()
            if is_counted:
                self.profile.enable()
            try:
                return inner(*arguments)
            finally:
                if is_counted:
                    self.profile.disable()
                self.wall.append(perf_counter() - begin[0])
                self.computing.append(thread_time() - begin[1])
                self._depth -= 1

        return timed


def train(kind: str) -> tuple[float, Spent]:
    """Train, and return the median seconds of a step and what was spent in the comparison."""
    timed, spent = Timed(), Spent()
    strategy = RingSequenceParallelStrategy()
    before = {name: getattr(LoaderWatch, name) for name in PARTS}
    for name, inner in before.items():
        none: Any = lambda *_: None  # noqa: E731
        setattr(LoaderWatch, name, none if kind == "without" else spent.wrapped(inner, kind == "counted"))
    try:
        torch.manual_seed(0)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=RANKS,
            strategy=strategy,
            max_steps=STEPS,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[timed],
        )
        trainer.fit(Model(), DataLoader(Rows(), batch_size=1))
        dist.barrier()
    finally:
        for name, inner in before.items():
            setattr(LoaderWatch, name, inner)
    steps = [after - before for before, after in zip(timed.stamps, timed.stamps[1:], strict=False)]
    return statistics.median(steps[SKIPPED:]), spent


def work(rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {"with": [], "without": [], "wall": [], "computing": []}
    for turn in range(rounds):
        for kind in ("with", "without") if turn % 2 else ("without", "with"):
            step, spent = train(kind)
            found[kind].append(round(step, 5))
            if kind == "with":
                for name in ("wall", "computing"):  # the first message connects the ranks
                    seconds = getattr(spent, name)[len(PARTS) * SKIPPED :]
                    found[name].append(round(sum(seconds) / (STEPS - SKIPPED), 7))
    _, spent = train("counted")
    found["calls"] = sum(entry.callcount for entry in spent.profile.getstats()) / STEPS
    return found


def measured(rounds: int) -> dict[str, Any]:
    load = os.getloadavg()[0]
    found = on_ranks(RANKS, work, rounds)
    return {
        "machine": described("cpu"),
        "load_before": round(load, 2),
        "rounds": rounds,
        "steps": STEPS,
        "step_seconds": {kind: found[kind] for kind in ("with", "without")},
        "comparison_seconds": found["wall"],
        "computing_seconds": found["computing"],
        "calls": round(found["calls"], 1),
        "messages": 1,
        "sent_bytes": 24 * (RANKS - 1),  # three numbers to each other rank
    }


def table(result: dict[str, Any]) -> str:
    step = statistics.median(result["step_seconds"]["without"])
    wall, own = (statistics.median(result[f"{name}_seconds"]) for name in ("comparison", "computing"))
    pairs = zip(result["step_seconds"]["with"], result["step_seconds"]["without"], strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    return "\n".join(
        [
            "| a step | in the comparison | of it computing | a step with it, over one without | calls | bytes sent |",
            "|---" * 6 + "|",
            f"| {step * 1e3:.1f} ms | {wall * 1e3:.2f} ms, {wall / step:.2%} | {own * 1e3:.2f} ms, {own / step:.2%} "
            f"| {ratio:.3f} | {result['calls']:.0f} | {result['sent_bytes']} |",
        ]
    )


if __name__ == "__main__":
    run(__doc__, RESULT, measured, table, rounds=5)  # --rounds, --table
