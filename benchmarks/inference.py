"""Measure the next token of a text: from a DilatedCache, from a full cache, from a Llama's cache, and without one.

    python benchmarks/inference.py
    python benchmarks/inference.py --contexts 1024 8192 --rounds 1 --tokens 8 --out other.json
    python benchmarks/inference.py --table            # the committed result, as the pages show it
    python benchmarks/inference.py --plot-only        # draws the committed result again

The participants take turns within a round, in one process, and the median over the rounds counts.  Caches are filled
with random keys and values, since the time of a token does not depend on what they are; memory is that of a cache's
rows, and without a cache the peak of a call.  Participants that would need more than half of the free memory are left
out, and a row says how much they need.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from figure import draw_inference
from machine import allocated, described

from lightning_longnet import DilatedCache, LongNet, LongNetConfig, Pattern

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lightning_longnet import RotaryPositions
    from lightning_longnet.layers.positions import Factors

DIM, LAYERS, HEADS = 128, 4, 4
PATTERN = Pattern.dilated((256, 1024, 4096), (1, 2, 8), is_causal=True)
CONTEXTS = [1024, 8192, 65536, 1048576]
RECOMPUTED = 65536  # beyond this context a token without a cache takes minutes
PREFILL = 16384
RESULT = Path(__file__).parent / "results" / "inference-cpu.json"


class FullCache:
    """All keys and values of a LongNet, attended to by torch's scaled_dot_product_attention: a dense model's cache."""

    def __init__(self, context: int, further: int) -> None:
        self.size = context
        self.factors: Factors | None = None  # of the step, which all layers share
        self.rows = [torch.randn(2, 1, HEADS, context + further, DIM // HEADS) for _ in range(LAYERS)]

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows)

    def layer(self, number: int) -> FullLayer:
        return FullLayer(self, self.rows[number])


class FullLayer:
    """The step of one layer, as `DilatedSelfAttention` calls it."""

    def __init__(self, cache: FullCache, rows: Tensor) -> None:
        self.cache, self.rows = cache, rows

    def rotated(self, rotary: RotaryPositions, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.cache.factors is None:
            self.cache.factors = rotary.factors(q, k, torch.tensor([[self.cache.size]]))
        return rotary.turned(q, k, self.cache.factors)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        self.rows[:, :, :, self.cache.size] = torch.stack((k, v))[:, :, 0]
        keys, values = self.rows[:, :, :, : self.cache.size + 1]
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values).transpose(1, 2)


def filled(model: LongNet, context: int) -> DilatedCache:
    """Return a cache as it is after `context` tokens, of random keys and values."""
    cache = model.new_cache()
    about = cache.state().about | {"positions": [context]}
    tensors = {}
    for i, layer in enumerate(cache.layers):
        for j, store in enumerate(layer.stores):
            tensors[f"{i}.{j}.rows"] = torch.randn(2, 1, HEADS, store.capacity or context, DIM // HEADS)
    cache.restore(tensors, about)
    return cache


def llama_of(context: int) -> tuple[Callable[[Tensor], None], int]:
    """Return a step of transformers' Llama of the same size with a filled cache, and the bytes of the cache."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=8 * DIM // 3,  # three matrices, with as many values as the two of a LongNet
        max_position_embeddings=2 * context,
    )
    config._attn_implementation = "sdpa"
    llama, past = LlamaForCausalLM(config).eval(), DynamicCache(config=config)
    for layer in range(LAYERS):
        past.update(*torch.randn(2, 1, HEADS, context, DIM // HEADS), layer)

    def step(token: Tensor) -> None:
        llama(token, past_key_values=past, use_cache=True)

    return step, 2 * LAYERS * context * DIM * 4


def participants(model: LongNet, context: int, further: int) -> dict[str, tuple[Callable[[Tensor], Any], int]]:
    """Return a step of one token of each participant, and the bytes that it keeps."""
    dilated, full = filled(model, context), FullCache(context, further)

    def full_step(token: Tensor) -> None:
        model.head(model.norm(model._run_cached_blocks(model.embed(token), full)))  # type: ignore[arg-type]
        full.size, full.factors = full.size + 1, None

    found: dict[str, tuple[Callable[[Tensor], Any], int]] = {
        "DilatedCache": (lambda token: model(token, cache=dilated), dilated.nbytes),
        "full cache, SDPA": (full_step, full.nbytes),
        "Llama of transformers": llama_of(context),
    }
    if context <= RECOMPUTED:
        text = torch.randint(256, (1, context))

        def recomputed(_: Tensor) -> Tensor:
            return model.head(model.encode(model.embed(text))[:, -1])  # type: ignore[no-any-return]

        found["no cache"] = (recomputed, allocated(lambda: recomputed(text)))
    return found


def measured(model: LongNet, context: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each participant at a context."""
    needed = 3 * 2 * LAYERS * context * DIM * 4  # of both full caches, one of which is copied to grow
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free / 2:
        dilated = filled(model, context)
        steps: dict[str, tuple[Callable[[Tensor], Any], int]] = {
            "DilatedCache": (lambda token: model(token, cache=dilated), dilated.nbytes)
        }
    else:
        steps = participants(model, context, options.rounds * options.tokens + 1)
    times: dict[str, list[float]] = {name: [] for name in steps}
    token = torch.zeros(1, 1, dtype=torch.int64)
    for round_number in range(options.rounds):
        for name, (step, _) in steps.items():
            count = 1 if name == "no cache" else options.tokens
            if round_number == 0:
                step(token)  # what is made at the first call does not count
            begin = perf_counter()
            for _ in range(count):
                step(token)
            times[name].append((perf_counter() - begin) / count * 1000)
    rows: list[dict[str, Any]] = [
        {
            "context": context,
            "participant": name,
            "ms": round(statistics.median(times[name]), 3),
            "mib": round(kept / 2**20, 2),
        }
        for name, (_, kept) in steps.items()
    ]
    if len(steps) == 1:
        rows.append({"context": context, "participant": "full caches", "needed_mib": round(needed / 2**20)})
    return rows


def prefilled(model: LongNet, rounds: int) -> dict[str, Any]:
    """Return the tokens/s of a prompt into a cache, and of the forward of training."""
    tokens = torch.randint(256, (1, PREFILL))
    seconds: dict[str, list[float]] = {"cache": [], "training": []}
    for _ in range(rounds):
        for name, times in seconds.items():
            begin = perf_counter()
            if name == "cache":
                model.encode(model.embed(tokens), cache=model.new_cache())
            else:
                with torch.enable_grad():
                    model.encode(model.embed(tokens))
            times.append(perf_counter() - begin)
    return {"tokens": PREFILL} | {name: round(PREFILL / statistics.median(times)) for name, times in seconds.items()}


def table(result: dict[str, Any]) -> str:
    """Return the times and the memory of the caches as a table of Markdown."""
    names = list(dict.fromkeys(row["participant"] for row in result["rows"] if "ms" in row))
    lines = ["| tokens of the text | " + " | ".join(names) + " |", "|---:|" + "---:|" * len(names)]
    for context in dict.fromkeys(row["context"] for row in result["rows"]):
        rows = {row["participant"]: row for row in result["rows"] if row["context"] == context and "ms" in row}
        cells = [_cell(rows.get(name)) for name in names]
        lines.append(f"| {context:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    return "not run" if row is None else f"{row['ms']:,.2f} ms, {row['mib']:,.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a participant in a round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the committed result")
    parser.add_argument("--plot-only", action="store_true", help="draw the committed result again, measure nothing")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.out.read_text())))
        return
    if not options.plot_only:
        measure(options)
    draw_inference(json.loads(options.out.read_text()), options.out.with_suffix(".png"))


def measure(options: argparse.Namespace) -> None:
    """Measure all contexts and the prompt, and write the result."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = LongNet(LongNetConfig(PATTERN, dim=DIM, layers=LAYERS, heads=HEADS)).eval()
    result: dict[str, Any] = {"machine": described("cpu"), "pattern": PATTERN.to_dict(), "rows": []}
    with torch.no_grad():
        for context in options.contexts:
            result["rows"] += measured(model, context, options)
            for row in result["rows"]:
                if row["context"] == context:
                    print(row, flush=True)
        result["prefill"] = prefilled(model, options.rounds)
        print(result["prefill"])
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
