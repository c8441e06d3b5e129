"""`MemoryMonitor`: the memory of each rank, at its peak and now, by kind."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from lightning_longnet.callbacks.monitor import Monitor
from lightning_longnet.sequence import sequence_context

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

GIB = 2**30
_KINDS = ("parameters", "gradients", "optimizer", "exchange", "activations")


class MemoryMonitor(Monitor):
    """Logs `memory/...`; see `lightning_longnet.callbacks.monitor` for the keys.

    On CUDA the figures are those of torch's allocator, on a CPU those of the process, whose memory before training
    does not count as activations.  Gradients and states that DeepSpeed keeps in its buffers are counted where it
    shows them, and else as activations.  The keys and values of other ranks that are kept for the backward are counted
    as the plan predicts them.
    """

    names = ("peak", "current", *_KINDS)

    def __init__(self) -> None:
        super().__init__()
        self._before = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the memory of the process before training, which does not count as activations."""
        super().on_train_start(trainer, pl_module)
        device = trainer.strategy.root_device
        held = sum(self._held(trainer, pl_module).values())
        # the interpreter and its libraries, which the allocator of a GPU does not see
        self._before = 0.0 if device.type == "cuda" else max(_of_process()[1] - held, 0.0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Have the calls of attention of a micro-batch listed, for `_kept`."""
        sequence_context(pl_module).traffic.calls = []

    def own_numbers(self, trainer: Trainer, module: LightningModule, batch: Any) -> list[float]:
        """Return the bytes of this rank at the peak and now, and of each kind, in the order of `names`."""
        device = trainer.strategy.root_device
        if device.type == "cuda":
            peak, current = map(float, (torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)))
        else:
            peak, current = _of_process()
        held = self._held(trainer, module) | {"exchange": float(_kept(module))}
        activations = max(peak - self._before - sum(held.values()), 0)
        held["activations"] = activations
        return [float(peak), float(current), *(held[name] for name in _KINDS)]

    def _held(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """Return the bytes of parameters with buffers, gradients and optimizer states on this rank's device."""
        device = trainer.strategy.root_device.type
        parameters = list(module.parameters())
        states = (
            x
            for optimizer in trainer.optimizers
            for state in getattr(optimizer, "state", {}).values()
            for x in (state.values() if isinstance(state, dict) else ())
            if isinstance(x, torch.Tensor)
        )
        return {
            "parameters": _bytes([*parameters, *module.buffers()], device),
            "gradients": _bytes((p.grad for p in parameters if p.grad is not None), device),
            "optimizer": _bytes(states, device),
        }

    def figures_of(self, gathered: dict[str, Tensor]) -> dict[str, float]:
        """Return `memory/...` in GiB: over all ranks, and by kind on the rank with the highest peak."""
        figures = {}
        for name in ("peak", "current"):
            numbers = gathered[name] / GIB
            figures[f"{name}_gib_min"] = float(numbers.min())
            figures[f"{name}_gib_median"] = float(numbers.quantile(0.5))
            figures[f"{name}_gib_max"] = float(numbers.max())
        fullest = int(gathered["peak"].argmax())
        figures["peak_rank"] = float(fullest)
        figures |= {f"{name}_gib": float(gathered[name][fullest]) / GIB for name in _KINDS}
        return {f"memory/{name}": value for name, value in figures.items()}


def _bytes(tensors: Iterable[Tensor], device: str) -> float:
    """Return the bytes of the tensors, or of this rank's shards of them, on devices of a type.

    Tensors that share memory count once.
    """
    sizes: dict[tuple[int, int], int] = {}
    for x in tensors:
        part = getattr(x, "ds_tensor", None)  # of a parameter that DeepSpeed has split
        local = part if isinstance(part, torch.Tensor) else x.to_local() if isinstance(x, DTensor) else x
        if local.device.type == device and local.numel():
            sizes[local.data_ptr(), local.numel()] = local.numel() * local.element_size()
    return float(sum(sizes.values()))


def _kept(module: LightningModule) -> int:
    """Return the bytes of keys and values of other ranks that are kept for the backward, as the plan predicts them.

    If layers are recomputed, which their number of forwards shows, one layer keeps them at a time.
    """
    context = sequence_context(module)
    calls = context.traffic.calls or []
    kept = [
        plan.volume(context.sequence_parallel_rank, sizes).kept_bytes
        for direction, plan, sizes in calls
        if direction == "backward"
    ]
    if len(calls) > 2 * len(kept):
        return max(kept, default=0)
    return sum(kept)


def _of_process() -> tuple[float, float]:
    """Return (peak, current) bytes of this process's resident memory; the peak twice on systems other than Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        peak, now = (1024.0 * int(lines[name].split()[0]) for name in ("VmHWM", "VmRSS"))
        return peak, now
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
    return peak, peak
