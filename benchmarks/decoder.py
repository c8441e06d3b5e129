"""Measure training steps of a small Llama: attn_implementation="ring" beside "sdpa", and two ranks beside one.

    python benchmarks/decoder.py                 # about a minute on two quiet cores
    python benchmarks/decoder.py --rounds 2 --out other.json
    python benchmarks/decoder.py --table         # the committed result, as a page would show it

A step is the forward, the backward and the update of AdamW, on one thread.  The participants take turns within a round,
and the median over the rounds counts; ratios are medians over the ratios of the rounds.  In the second part rank 0
first trains on the whole row while rank 1 waits, and then both train on their parts of it, whose placement is zigzag,
and add up their gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from machine import described
from ranks import on_ranks

from lightning_longnet import SequenceContext, attach_context, sequence_mesh

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

VOCABULARY = 256
WHOLE_TOKENS, SPLIT_TOKENS = 2048, 16384
MOST, LEAST = 1.05, 1.8  # the goals: the ratio of both implementations, and of one rank over two
RESULT = Path(__file__).parent / "results" / "decoder-cpu.json"


def llama(attention: str, layers: int, width: int) -> nn.Module:
    """Return a Llama with random weights, which are equal for each call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        max_position_embeddings=SPLIT_TOKENS,
        use_cache=False,
    )
    config._attn_implementation = attention
    made = LlamaForCausalLM(config)
    assert made.config._attn_implementation == attention
    return made


def row_of(tokens: int) -> dict[str, Tensor]:
    """Return a row of random tokens, with the token that follows each as its label."""
    ids = torch.randint(VOCABULARY, (1, tokens + 1), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


class Training:
    """The steps of a model on one process, or on the ranks of a context."""

    def __init__(self, model: nn.Module, context: SequenceContext | None = None) -> None:
        self.model, self.context = model, context or SequenceContext()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(self, row: dict[str, Tensor]) -> float:
        """Train on a row, which is whole or this rank's part, and return the loss."""
        ids, context = row["input_ids"], self.context
        positions = context.positions_of(ids)[None]
        logits = self.model(input_ids=ids, position_ids=positions).logits
        loss_sum = F.cross_entropy(logits.flatten(0, 1), row["labels"].flatten(), reduction="sum")
        # a rank that trains on whole rows does so alone
        loss = context.token_mean(loss_sum, ids.numel()) if context.is_split else loss_sum / ids.numel()
        loss.backward()
        if context.is_split:
            gradients = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
            dist.all_reduce(gradients)
            gradients /= dist.get_world_size()
            parts = gradients.split([p.numel() for p in self.model.parameters()])
            for parameter, part in zip(self.model.parameters(), parts, strict=True):
                parameter.grad = part.view_as(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds of a call by the clock, and those in which this process computed."""
    begin, computed = perf_counter(), process_time()
    call()
    return perf_counter() - begin, process_time() - computed


def implementations(rounds: int, tokens: int = WHOLE_TOKENS) -> dict[str, Any]:
    """Measure the step of both implementations where nothing is split, on one thread."""
    torch.set_num_threads(1)
    runs = {name: Training(llama(name, layers=4, width=256)) for name in ("sdpa", "ring")}
    row, times = row_of(tokens), {name: list[tuple[float, float]]() for name in runs}
    losses = {name: run.step(row) for name, run in runs.items()}  # what is made at the first step does not count
    for number in range(rounds):
        for name in sorted(runs, reverse=number % 2 == 0):
            times[name].append(timed(lambda run=runs[name]: run.step(row)))  # type: ignore[misc]
    pairs = zip(times["ring"], times["sdpa"], strict=True)
    ratios = [(ring[0] / sdpa[0], ring[1] / sdpa[1]) for ring, sdpa in pairs]
    return {
        "tokens": tokens,
        "layers": 4,
        "width": 256,
        "seconds": {name: _median([each[0] for each in found]) for name, found in times.items()},
        "ratio": _median([each[0] for each in ratios]),
        "ratio_of_cpu_time": _median([each[1] for each in ratios]),
        "difference_of_losses": abs(losses["ring"] - losses["sdpa"]),
        "rounds": rounds,
    }


def on_two_ranks(rounds: int, tokens: int) -> dict[str, Any]:
    """Measure the step of rank 0 on a whole row, and that of both ranks on their parts; both ranks call it."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    context = SequenceContext(sequence_mesh(), placement="zigzag")
    whole, split = Training(llama("ring", 2, 128)), Training(llama("ring", 2, 128), context)
    attach_context(split.model, context)
    row, short = row_of(tokens), row_of(256)
    whole.step(short)
    split.step(context.split(short))
    times: dict[str, list[tuple[float, float]]] = {"one rank": [], "two ranks": []}
    for _ in range(rounds):
        if dist.get_rank() == 0:
            times["one rank"].append(timed(lambda: whole.step(row)))
        dist.barrier()
        seconds, computed = timed(lambda: (split.step(context.split(row)), dist.barrier()))
        by_rank: list[float] = [0.0, 0.0]
        dist.all_gather_object(by_rank, computed)
        times["two ranks"].append((seconds, max(by_rank)))
    if dist.get_rank() > 0:
        return {}
    pairs = zip(times["one rank"], times["two ranks"], strict=True)
    ratios = [(one[0] / two[0], one[1] / two[1]) for one, two in pairs]
    return {
        "tokens": tokens,
        "layers": 2,
        "width": 128,
        "seconds": {name: _median([each[0] for each in found]) for name, found in times.items()},
        "ratio": _median([each[0] for each in ratios]),
        "ratio_of_cpu_time": _median([each[1] for each in ratios]),
        "rounds": rounds,
    }


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 4)


def table(result: dict[str, Any]) -> str:
    """Return the result as a table of Markdown."""
    whole, split = result["implementations"], result["ranks"]
    lines = ["| a training step | tokens | seconds | ratio | goal |", "|---|---:|---:|---:|---:|"]
    for name, row, ratio in (
        ("`sdpa`, one process", whole, ""),
        ("`ring`, one process", whole, f"{whole['ratio']:.3f} of sdpa | at most {MOST}"),
        ("one rank of one thread", split, ""),
        ("two ranks of one thread, zigzag", split, f"{split['ratio']:.2f} times as fast | at least {LEAST}"),
    ):
        key = next(key for key in row["seconds"] if key in name)
        lines.append(f"| {name} | {row['tokens']:,} | {row['seconds'][key]:.3f} | {ratio or ' | '} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of both implementations")
    parser.add_argument("--rounds-of-ranks", type=int, default=5)
    parser.add_argument("--tokens-of-ranks", type=int, default=SPLIT_TOKENS)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the committed result")
    options = parser.parse_args()
    if not options.table:
        result = {
            "ranks": on_ranks(2, on_two_ranks, options.rounds_of_ranks, options.tokens_of_ranks),
            "implementations": implementations(options.rounds),
            "machine": described("cpu"),
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.out.exists():
        print(table(json.loads(options.out.read_text())))
    else:
        print(f"{options.out} is not there yet: leave out --table to measure it", file=sys.stderr)


if __name__ == "__main__":
    main()
