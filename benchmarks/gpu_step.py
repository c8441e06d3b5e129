"""Measure a training step of LongNet's 125M model on one device, with the time of its parts; print a line of JSON.

    python benchmarks/gpu_step.py --tokens 65536

The model is that of `configs/longnet/125m.yaml`, in bf16-mixed with AdamW.  The parts are those of one more step under
a profiler: products of matrices, attention forward and backward, and all other kernels, beside the phases of a step
without it.  Where a step does not fit, it is tried again with all activations recomputed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from lightning_longnet import Branch, LongNet, LongNetConfig, Pattern

CONFIG = Path(__file__).resolve().parents[1] / "configs/longnet/125m.yaml"
STEPS, SKIPPED = 5, 2
RECOMPUTED = ("all but attention", "everything")
_ATTENTION = {
    "lightning_longnet::attend": "attention, forward",
    "lightning_longnet::attend_backward": "attention, backward",
}
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


class Step:
    """A training step: called, it returns the seconds of its forward with the loss, its backward and its optimiser."""

    def __init__(self, config: LongNetConfig, tokens: int, device: str) -> None:
        torch.manual_seed(0)
        self.model = LongNet(config).to(device)
        self.ids = torch.randint(config.vocab_size, (1, tokens + 1), device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=device == "cuda")
        self.device = device

    def __call__(self) -> tuple[float, float, float]:
        begin = self._now()
        with torch.autocast(self.device, torch.bfloat16):
            loss_sum, count = self.model(self.ids[:, :-1], self.ids[:, 1:])
        forward = self._now()
        (loss_sum / count).backward()
        backward = self._now()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return forward - begin, backward - forward, self._now() - backward

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return perf_counter()


def config_of(values: dict[str, Any], recompute: str) -> LongNetConfig:
    """Return the configuration of a model out of a configuration of `longnet fit`."""
    config = {**values["model"]["config"], "recompute": recompute}
    branches = tuple(Branch(**each) for each in config.pop("pattern")["branches"])
    return LongNetConfig(Pattern(branches), **config)


def parts(step: Step) -> dict[str, float]:
    """Return the seconds that a step spends in attention, in products outside of it, and in all else, on its device."""
    is_cuda = step.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as found:
        step()
    seconds = dict.fromkeys((*_ATTENTION.values(), "products", "all other operators"), 0.0)
    for event in found.events():
        if event.device_type.name == "CPU":  # a kernel's time is also that of the operator that launched it
            seconds[_part(event)] += (event.self_device_time_total if is_cuda else event.self_cpu_time_total) / 1e6
    return seconds


def _part(event: Any) -> str:
    """Return the part that an operator belongs to; a product inside of attention is attention."""
    caller = event
    while caller is not None:
        if caller.name in _ATTENTION:
            return _ATTENTION[caller.name]
        caller = caller.cpu_parent
    return "products" if event.name in _PRODUCTS else "all other operators"


def measure(values: dict[str, Any], tokens: int, device: str) -> dict[str, Any]:
    """Return the result of the least recomputation that fits."""
    for recompute in RECOMPUTED:
        try:
            return {"tokens": tokens, "recompute": recompute} | _measured(values, tokens, device, recompute)
        except torch.cuda.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()
    return {"tokens": tokens, "out_of_memory": True}


def _measured(values: dict[str, Any], tokens: int, device: str, recompute: str) -> dict[str, Any]:
    step = Step(config_of(values, recompute), tokens, device)
    rows = [step() for _ in range(SKIPPED + STEPS)][SKIPPED:]
    phases = [statistics.median(column) for column in zip(*rows, strict=True)]
    seconds = statistics.median(map(sum, rows))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "step_seconds": round(seconds, 5),
        "tokens_per_second": round(tokens / seconds),
        "phases": dict(zip(("forward and loss", "backward", "optimiser"), (round(x, 5) for x in phases), strict=True)),
        "parts": {part: round(x, 5) for part, x in parts(step).items()},
        "peak_gib": round(peak / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    print(json.dumps(measure(yaml.safe_load(options.config.read_text()), options.tokens, options.device)))


if __name__ == "__main__":
    main()
