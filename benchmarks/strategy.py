"""Measure the cost of the strategy without split sequences: the time of a step over that with Lightning's strategy.

    python benchmarks/strategy.py
    python benchmarks/strategy.py --table            # the committed result, as the pages show it

Each round trains the same model for some steps with every participant, in the same processes of one thread each.  A
step lasts from one batch to the next.  The benchmark also counts the calls of Python and C functions in a step, which
do not depend on the load of the machine.
"""

from __future__ import annotations

import statistics
from cProfile import Profile
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from machine import described, run
from ranks import on_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_longnet import DilatedSelfAttention, FeedForward, Pattern, sequence_context
from lightning_longnet.strategies import RingSequenceParallelStrategy

SIZES = {"2,048 tokens, width 128": (2048, 128), "512 tokens, width 64": (512, 64)}
LAYERS, STEPS, SKIPPED = 4, 8, 2
RESULT = Path(__file__).parent / "results" / "strategy-cpu.json"


class Net(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        pattern = Pattern.dilated((256, 1024, 4096), (1, 2, 4), is_causal=True)
        self.embed = nn.Embedding(256, dim)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), DilatedSelfAttention(dim, 4, pattern), FeedForward(dim))
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(dim, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.head(x)
        return logits


class Model(L.LightningModule):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = Net(dim)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        logits, labels = self.net(batch["input_ids"]), batch["labels"]
        nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return sequence_context(self).token_mean(nats, labels.numel())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Sharded(Model):
    """The model as a user of Lightning's FSDP2 strategy writes it."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class Timed(L.Callback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.seconds.append(perf_counter())


class Counted(L.Callback):
    """A callback that counts the function calls in the timed steps."""

    def __init__(self) -> None:
        self.profile = Profile()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == SKIPPED:
            self.profile.enable()
        if trainer.global_step == STEPS:
            self.profile.disable()

    @property
    def calls(self) -> float:
        return sum(entry.callcount for entry in self.profile.getstats()) / (STEPS - SKIPPED)


def participants(ranks: int) -> dict[str, tuple[type[Model], Any]]:
    def ours(sharding: str) -> RingSequenceParallelStrategy:
        return RingSequenceParallelStrategy(1, sharding)  # type: ignore[arg-type]

    return {
        "ddp: Lightning's": (Model, DDPStrategy()),
        "ddp: ours": (Model, ours("ddp")),
        "fsdp2: Lightning's": (Sharded, ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)),
        "fsdp2: ours": (Model, ours("fsdp2")),
    }


def train(
    kind: type[Model], strategy: Any, ranks: int, tokens: int, dim: int, counted: Counted | None = None
) -> list[float]:
    """Train, and return the seconds from one batch to the next."""
    torch.manual_seed(0)
    rows = [{"input_ids": torch.randint(256, (tokens,)), "labels": torch.randint(256, (tokens,))} for _ in range(8)]
    timed = Timed()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        max_steps=STEPS + 1,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[timed, *([counted] if counted else [])],
    )
    loader: Any = DataLoader(rows * STEPS, batch_size=1)  # type: ignore[arg-type]
    trainer.fit(kind(dim), loader)
    return [after - before for before, after in zip(timed.seconds, timed.seconds[1:], strict=False)][SKIPPED:]


def work(ranks: int, rounds: int) -> dict[str, Any]:
    medians: dict[str, dict[str, list[float]]] = {}
    for turn in range(rounds):
        for size, (tokens, dim) in SIZES.items():
            order = list(participants(ranks).items())
            for name, (kind, strategy) in order if turn % 2 else reversed(order):  # nobody is always first
                seconds = statistics.median(train(kind, strategy, ranks, tokens, dim))
                medians.setdefault(size, {}).setdefault(name, []).append(seconds)
    calls: dict[str, dict[str, float]] = {}
    for size, (tokens, dim) in SIZES.items():
        for name, (kind, strategy) in participants(ranks).items():
            counted = Counted()
            train(kind, strategy, ranks, tokens, dim, counted)
            calls.setdefault(size, {})[name] = round(counted.calls, 1)
    return {"seconds": medians, "calls": calls}


def measured(rounds: int) -> dict[str, Any]:
    rows = []
    for ranks in (1, 2):
        result = on_ranks(ranks, work, ranks, rounds)
        for size in SIZES:
            for name in participants(ranks):
                seconds = [round(s, 5) for s in result["seconds"][size][name]]
                row = {"ranks": ranks, "size": size, "name": name, "seconds": seconds}
                rows.append(row | {"calls": result["calls"][size][name]})
    return {"machine": described("cpu"), "rounds": rounds, "steps": STEPS - SKIPPED, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table: medians, the ratio to Lightning's with its quartiles, and function calls."""
    lines = ["| ranks | model | engine | Lightning's | ours | ratio | its quartiles | calls |", "|---" * 8 + "|"]
    calls = {(row["ranks"], row["size"], row["name"]): row["calls"] for row in result["rows"]}
    seconds = {(row["ranks"], row["size"], row["name"]): row["seconds"] for row in result["rows"]}
    for ranks, size, name in seconds:
        if not name.endswith("ours"):
            continue
        engine = name.split(":")[0]
        own, stock = seconds[ranks, size, name], seconds[ranks, size, f"{engine}: Lightning's"]
        low, ratio, high = statistics.quantiles([a / b for a, b in zip(own, stock, strict=True)], n=4)
        shown = (f"{statistics.median(each) * 1e3:,.1f} ms" for each in (stock, own))
        called = calls[ranks, size, name] / calls[ranks, size, f"{engine}: Lightning's"]
        cells = f"{' | '.join(shown)} | {ratio:.3f} | {low:.2f} to {high:.2f} | {called:.3f}"
        lines.append(f"| {ranks} | {size} | {engine} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(__doc__, RESULT, measured, table, rounds=7)  # --rounds, --table
