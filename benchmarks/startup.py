"""Measure what a user waits for until the first step of training is done, beside a plain Trainer of Lightning.

    python benchmarks/startup.py
    python benchmarks/startup.py --table            # the committed result, as the pages show it

Each run is a whole program, from the start of its process to the end of the first optimizer step of rank 0.  A round
has a run of each participant: a LongNet with the strategy of this package, with the sharding that is its default and
with "ddp", and a transformer of torch of the same width and depth with Lightning's DDP, on two ranks and on one device.
The time of the CPU is that of rank 0; it depends less on what else the machine does.  Python keeps the bytecode of all
modules, as in a user's second run: a run of each participant that is not counted writes it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from math import fsum  # which rounds alike on all versions of Python
from pathlib import Path
from typing import Any

LENGTH, WIDTH, HEADS, LAYERS = 2048, 128, 4, 4
RESULT = Path(__file__).parent / "results" / "startup-cpu.json"
PLAIN, OURS, OURS_DDP = "Lightning's", "ours", "ours with ddp"
STRATEGIES = {OURS: "ring_sequence_parallel", OURS_DDP: "ring_sequence_parallel_ddp"}
RANKS = (1, 2)
PHASES = ("imports of Lightning", "imports of ours", "Trainer and model", "ranks connect", "set-up", "first step")


def train(name: str, ranks: int, folder: Path) -> None:
    """Train for a step, and let rank 0 write (seconds since the start of the program, of its CPU) after each phase."""
    stamps: list[tuple[float, float]] = []

    def stamp() -> None:
        stamps.append((time.time() - float(os.environ["STARTUP_BEGIN"]), time.process_time()))

    import lightning as L
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

    stamp()
    if name in STRATEGIES:
        from lightning_longnet import LongNet, LongNetConfig, Pattern, sequence_context
    stamp()

    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            if name in STRATEGIES:
                pattern = Pattern.dilated((256, 1024, 2048), (1, 2, 4), is_causal=True)
                self.model: nn.Module = LongNet(LongNetConfig(pattern, dim=WIDTH, layers=LAYERS, heads=HEADS))
                return
            layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, batch_first=True)
            encoder = nn.TransformerEncoder(layer, LAYERS)
            self.model = nn.Sequential(nn.Embedding(256, WIDTH), encoder, nn.Linear(WIDTH, 256))

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            if name in STRATEGIES:
                nats, count = self.model(batch["input_ids"], batch["labels"])
                return sequence_context(self).token_mean(nats, count)
            logits = self.model(batch["input_ids"])
            return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    class Stamps(L.Callback):
        def setup(self, *_: Any, **__: Any) -> None:
            stamp()

        def on_train_start(self, *_: Any) -> None:
            stamp()

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            stamp()
            if trainer.is_global_zero:
                (folder / "stamps.json").write_text(json.dumps(stamps))

    strategy = STRATEGIES.get(name, "ddp" if ranks > 1 else "auto")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Stamps()],
    )
    torch.manual_seed(0)
    model, text = Model(), torch.randint(256, (1, LENGTH + 1))
    rows: Any = [{"input_ids": text[0, :-1], "labels": text[0, 1:]}]
    stamp()
    trainer.fit(model, DataLoader(rows, batch_size=1))


def measured_once(name: str, ranks: int) -> list[list[float]]:
    """Return the seconds and the seconds of the CPU of each phase of a program."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--train", name, str(ranks), folder]
        environment = {**os.environ, "STARTUP_BEGIN": repr(time.time())}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=600)
        stamps = [[0.0, 0.0], *json.loads((Path(folder) / "stamps.json").read_text())]
    return [[round(after[i] - before[i], 3) for i in range(2)] for before, after in pairwise(stamps)]


def measured(rounds: int) -> dict[str, Any]:
    from machine import described

    names = [(name, ranks) for ranks in RANKS for name in (PLAIN, OURS, OURS_DDP)]
    for name in (PLAIN, OURS, OURS_DDP):
        measured_once(name, 1)  # writes the bytecode
    found: dict[tuple[str, int], list[Any]] = {each: [] for each in names}
    for turn in range(rounds):
        for name, ranks in names if turn % 2 else reversed(names):  # nobody is always first
            found[name, ranks].append(measured_once(name, ranks))
    rows = [{"name": name, "ranks": ranks, "phases": turns} for (name, ranks), turns in found.items()]
    return {"machine": described("cpu"), "rounds": rounds, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table of each phase: medians of the seconds and of those of the CPU, and what ours adds."""
    lines = [
        f"| ranks | phase | {PLAIN}, s | {OURS} adds, s | {OURS_DDP} adds, s | {PLAIN}, CPU s | {OURS} adds, CPU s "
        f"| {OURS_DDP} adds, CPU s |",
        "|---" * 8 + "|",
    ]
    turns = {(row["name"], row["ranks"]): row["phases"] for row in result["rows"]}

    def median(name: str, ranks: int, phases: slice, clock: int) -> float:
        return float(statistics.median(fsum(phase[clock] for phase in turn[phases]) for turn in turns[name, ranks]))

    phases = {phase: slice(number, number + 1) for number, phase in enumerate(PHASES)}
    for ranks in sorted({ranks for _, ranks in turns}):
        for phase, numbers in (phases | {f"all but the {PHASES[0]}": slice(1, None)}).items():
            cells = list[str]()
            for clock in (0, 1):
                stock = median(PLAIN, ranks, numbers, clock)
                added = (median(name, ranks, numbers, clock) - stock for name in STRATEGIES)
                cells += (f"{stock:.2f}", *(f"{seconds:+.2f}" for seconds in added))
            lines.append(f"| {ranks} | {phase} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    else:
        from machine import run

        run(__doc__, RESULT, measured, table, rounds=5)  # --rounds, --table
