"""Compare the memory, messages and time that `longnet plan` predicts with those of the same runs.

    python benchmarks/planner.py calibrated        # the configurations that its constants are fitted to
    python benchmarks/planner.py others            # other configurations
    python benchmarks/planner.py --table           # the committed result, as the pages show it

Processes of one thread each train for some steps, once under torch's profiler, for the peak memory of the tensors of
each rank, and once without it, for the time of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from machine import allocated, described
from ranks import on_ranks
from torch.utils.data import DataLoader

from lightning_longnet import LongNetConfig, LongNetModule, Pattern, sequence_context
from lightning_longnet.planning.devices import measured, named
from lightning_longnet.planning.job import Job
from lightning_longnet.planning.run import plan_run
from lightning_longnet.strategies import RingSequenceParallelStrategy

PATTERN = Pattern.dilated((256, 1024, 4096), (1, 2, 4), is_causal=True)
PROFILED, TIMED, SKIPPED = 3, 7, 2  # steps
SMALL = {"dim": 128, "layers": 4, "heads": 4}


def case(ranks: int, shared: int, sharding: str, tokens: int, model: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"ranks": ranks, "shared": shared, "sharding": sharding, "tokens": tokens, "model": model, **options}


CASES = {
    "calibrated": [
        case(1, 1, "ddp", 2048, {**SMALL, "vocab_size": 2000}),
        case(2, 2, "ddp", 4096, {**SMALL, "kv_heads": 2}),
        case(1, 1, "fsdp2", 512, {"dim": 384, "layers": 3, "heads": 6, "vocab_size": 8000}),
        case(2, 2, "fsdp2", 2048, {**SMALL, "dim": 256, "vocab_size": 8000, "recompute": "all but attention"}),
        case(4, 4, "fsdp2", 8192, {**SMALL, "layers": 6}, exchange="ring"),
        case(2, 2, "deepspeed_stage_2", 2048, {**SMALL, "dim": 192, "vocab_size": 2000}, bucket=500_000),
        case(2, 1, "deepspeed_stage_3", 1024, {**SMALL, "dim": 256, "vocab_size": 2000}, bucket=500_000),
    ],
    "others": [
        case(1, 1, "ddp", 1536, {"dim": 192, "layers": 6, "heads": 6, "activation": "swiglu"}),
        case(4, 2, "ddp", 4096, {**SMALL, "recompute": "everything", "feed_forward_chunk": 512}, exchange="ring"),
        case(2, 1, "fsdp2", 1024, {**SMALL, "dim": 192, "vocab_size": 4000}, batch=2),
        case(4, 4, "fsdp2", 4096, {**SMALL, "dim": 256, "layers": 3}, exchange="swap"),
        case(2, 2, "deepspeed_stage_2", 4096, {**SMALL, "layers": 6}, bucket=10**6, accumulate=2),
        case(4, 2, "deepspeed_stage_3", 1024, {**SMALL, "dim": 256, "layers": 2, "vocab_size": 2000}, bucket=250_000),
    ],
}
RESULT = Path(__file__).parent / "results" / "planner-cpu.json"


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, tokens: int, vocabulary: int) -> None:
        self.row = torch.randint(vocabulary, (tokens + 1,), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, _: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.row[:-1], "labels": self.row[1:]}


class Begun(L.Callback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.times.append(perf_counter())


def train(options: dict[str, Any], steps: int) -> tuple[LongNetModule, list[float]]:
    config = LongNetConfig(PATTERN, **options["model"])
    module, begun, many = LongNetModule(config), Begun(), options.get("accumulate", 1)
    engine = (
        None
        if "bucket" not in options
        else dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size"), options["bucket"])
    )
    trainer = L.Trainer(
        strategy=RingSequenceParallelStrategy(
            options["shared"], options["sharding"], options.get("exchange", "auto"), engine=engine
        ),
        accelerator="cpu",
        devices=options["ranks"],
        max_steps=steps,
        accumulate_grad_batches=many,
        gradient_clip_val=1.0,
        callbacks=[begun],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Rows(options["tokens"], config.vocab_size), batch_size=options.get("batch", 1)))
    return module, begun.times[::many]


def work(options: dict[str, Any], is_profiled: bool) -> list[Any]:
    """Return, for each rank, its peak memory and the bytes that it sent in a step, or the seconds of a step."""
    result: Any
    if is_profiled:
        modules: list[LongNetModule] = []
        peak = allocated(lambda: modules.append(train(options, PROFILED)[0]))
        result = peak, sequence_context(modules[0]).traffic.sent_bytes // PROFILED
    else:
        begun = train(options, TIMED)[1]
        result = statistics.median(b - a for a, b in zip(begun[SKIPPED:], begun[SKIPPED + 1 :], strict=False))
    everywhere = [result] * options["ranks"]
    if dist.is_initialized():
        dist.all_gather_object(everywhere, result)
    return everywhere


@lru_cache(1)
def peak() -> float:
    """Return the peak of this machine, measured once, so that its noise affects all rows equally."""
    return measured(torch.float32)


def predicted(options: dict[str, Any]) -> dict[str, Any]:
    job = job_of(options)
    begin = perf_counter()
    plan = plan_run(job, named("cpu"), named("cpu").shared(job.per_node, torch.get_num_threads()).share * peak())
    return {
        "in_seconds": round(perf_counter() - begin, 2),
        "peak": round(plan.memory.peak),
        "sent": [plan.sent_bytes(rank % job.shared_by) for rank in range(job.ranks)],
        "seconds": round(plan.time.seconds, 4),
        "time": {name: round(value, 5) for name, value in vars(plan.time).items()},
    }


def job_of(options: dict[str, Any]) -> Job:
    names = ("batch", "sharding", "exchange", "accumulate", "bucket")
    return Job(
        LongNetConfig(PATTERN, **options["model"]),
        options["tokens"],
        per_node=options["ranks"],
        sequence_parallel_size=options["shared"],
        **{name: options[name] for name in names if name in options},
    )


def measure(options: dict[str, Any]) -> dict[str, Any]:
    profiled = on_ranks(options["ranks"], work, options, True)
    row = {
        "case": options,
        "planned": predicted(options),
        "peaks": [peak for peak, _ in profiled],
        "sent": [sent for _, sent in profiled],
        "seconds": round(max(on_ranks(options["ranks"], work, options, False)), 4),
    }
    print(row, flush=True)
    return row


def shown(options: dict[str, Any]) -> str:
    model = LongNetConfig(PATTERN, **options["model"])
    words = [options["sharding"], f"{options['ranks']} x, {options['shared']} share {options['tokens']:,} tokens"]
    words += [f"width {model.dim}, {model.layers} layers"]
    words += [options["exchange"]] if "exchange" in options else []
    words += [f"computes {model.recompute} again"] if model.recompute != "nothing" else []
    return "; ".join(words)


def ordered(rows: list[dict[str, Any]]) -> tuple[int, int]:
    """Return how many pairs of runs take time in the predicted order, and the number of pairs."""
    pairs = [(a, b) for i, a in enumerate(rows) for b in rows[:i]]
    right = sum((a["seconds"] < b["seconds"]) == (a["planned"]["seconds"] < b["planned"]["seconds"]) for a, b in pairs)
    return right, len(pairs)


def table(result: dict[str, Any]) -> str:
    lines = ["| | run | peak, MiB | planned | sent, KiB | planned | a step, ms | planned |", "|---" * 8 + "|"]
    for kind in CASES:
        for row in filter(None, result.get(kind, [])):
            peak, planned = max(row["peaks"]) / 2**20, row["planned"]["peak"] / 2**20
            sent, said = (sum(each["sent"]) / 2**10 for each in (row, row["planned"]))
            times = f"{1e3 * row['seconds']:,.0f} | {1e3 * row['planned']['seconds']:,.0f}"
            peaks = f"{peak:,.1f} | {planned:,.1f}, {planned / peak - 1:+.1%}"
            lines.append(f"| {kind} | {shown(row['case'])} | {peaks} | {sent:,.0f} | {said:,.0f} | {times} |")
    for kind in CASES:
        right, pairs = ordered([*filter(None, result.get(kind, []))])
        lines.append(f"| {kind} | pairs of runs in the order that was planned | | | | | {right} of {pairs} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(CASES), help="calibrated, others: both by default")
    parser.add_argument(
        "--only", type=int, nargs="*", help="numbers of cases of the kind, which replace those of a result"
    )
    parser.add_argument("--replan", action="store_true", help="plan the runs of a result again, and run none")
    parser.add_argument("--table", action="store_true", help="print the committed result")
    options = parser.parse_args()
    if not options.table:
        torch.set_num_threads(1)
        result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        result |= {} if options.replan else {"machine": described("cpu")}
        for kind in options.kinds:
            rows = result.setdefault(kind, [None] * len(CASES[kind]))
            for i in options.only if options.only is not None else range(len(CASES[kind])):
                chosen = CASES[kind][i]
                rows[i] = rows[i] | {"planned": predicted(chosen)} if options.replan else measure(chosen)
                RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(table(json.loads(RESULT.read_text())) if RESULT.exists() else "not measured")


if __name__ == "__main__":
    main()
