"""`RunReport`: a callback that writes the record of a run for `longnet report`, in JSON, and the page made of it."""

from __future__ import annotations

import json
import platform
from collections import Counter
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch.callbacks import Callback

import lightning_longnet
from lightning_longnet.attention.parallel.sequence_plan import sequence_plan
from lightning_longnet.callbacks.monitor import Monitor
from lightning_longnet.callbacks.throughput import size_of
from lightning_longnet.layers.attending import AttentionLayer
from lightning_longnet.planning.devices import compute_dtype
from lightning_longnet.report import RECORD, write_report
from lightning_longnet.sequence import sequence_context

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_DRAWN_RANKS = 64  # pictures of more ranks are not drawn


class RunReport(Callback):
    """Writes `run.json` into the run's folder on rank 0 when fitting ends, and `report.html` beside it.

    The folder is that of the first logger, or the Trainer's `default_root_dir`.  A run that ends with an error is
    recorded up to the error.

    Args:
        html: also make the page, which `longnet report` can make later.
        images: write PNGs of the charts beside it, where matplotlib is installed.
    """

    def __init__(self, html: bool = True, images: bool = False) -> None:
        self.html, self.images = html, images
        self._folder: Path | None = None
        self._begun, self._started = 0.0, ""
        self._length, self._samples = 0, 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the folder and the time, on all ranks."""
        # all ranks must read log_dir, which rank 0 broadcasts
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        self._begun = perf_counter()
        self._started = datetime.now(UTC).isoformat(timespec="seconds")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the samples and the length of the first batch."""
        if not self._length:
            self._samples, _, self._length = size_of(batch, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record of a run that has ended well."""
        self._write(trainer, pl_module, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the record of a fit that an error has ended."""
        if self._folder is not None:
            self._write(trainer, pl_module, f"ended by {type(exception).__name__}")

    def _write(self, trainer: Trainer, module: LightningModule, status: str) -> None:
        """Write the record and the page on rank 0, once in a fit; `status` says how it ended."""
        if not trainer.is_global_zero or self._folder is None:
            return
        folder, self._folder = self._folder, None
        folder.mkdir(parents=True, exist_ok=True)
        for logger in trainer.loggers:
            logger.save()
        (folder / RECORD).write_text(json.dumps(self._record(trainer, module, status), indent=1) + "\n")
        if self.html:
            path = write_report([folder], folder / "report.html", images=self.images)
            rank_zero_info(f"RunReport: {path}")

    def _record(self, trainer: Trainer, module: LightningModule, status: str) -> dict[str, Any]:
        """Return the content of `run.json`."""
        context = sequence_context(module)
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        monitors = [each for each in trainer.callbacks if isinstance(each, Monitor)]  # type: ignore[attr-defined]
        metrics |= {key: value for each in monitors for key, value in each.figures.items()}
        device = trainer.strategy.root_device
        return {
            "status": status,
            "started": self._started,
            "seconds": round(perf_counter() - self._begun, 3),
            "module": type(module).__name__,
            "parameters": sum(int(getattr(p, "ds_numel", p.numel())) for p in module.parameters()),
            "steps": trainer.global_step,
            "ranks": trainer.world_size,
            "data_parallel": trainer.world_size // context.sequence_parallel_size,
            "sequence_parallel": context.sequence_parallel_size,
            "strategy": getattr(trainer.strategy, "sharding", None) or type(trainer.strategy).__name__,
            "precision": str(trainer.precision),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "versions": {
                "lightning-longnet": lightning_longnet.__version__,
                "lightning": lightning.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "tokens": self._length,
            "samples": self._samples,
            "final": {key: value for key, value in metrics.items() if isfinite(value)},
            "by_rank": {name: values for each in monitors for name, values in each.by_rank.items()},
            "attention": self._attention(module, compute_dtype(str(trainer.precision))),
        }

    def _attention(self, module: LightningModule, dtype: torch.dtype) -> list[dict[str, Any]]:
        """Return a record of each kind of attention layer: how many there are, and, if sequences are split, the plan.

        Args:
            module: the module.
            dtype: the dtype in which layers compute, for the bytes that the plan sends.
        """
        context = sequence_context(module)
        kinds = Counter(
            (
                layer.pattern,
                layer.num_heads,
                getattr(layer, "num_kv_heads", layer.num_heads),
                layer.head_dim,
                layer.exchange,
            )
            for layer in _layers(module)
        )
        records = []
        for (pattern, heads, kv_heads, head_dim, exchange), many in kinds.items():
            kind = {"layers": many, "heads": heads, "kv_heads": kv_heads, "pattern": pattern.to_dict()}
            ranks = context.sequence_parallel_size
            if 1 < ranks <= _DRAWN_RANKS and self._length >= ranks:
                placement = context.placement_of(self._length)
                plan = sequence_plan(
                    pattern,
                    placement.lengths,
                    heads,
                    kv_heads,
                    placement=placement.kind,
                    exchange=exchange or context.exchange,
                    batch=max(self._samples, 1),
                    head_dim=head_dim,
                    dtype=dtype,
                )
                kind["plan"] = {
                    "placement": placement.kind,
                    "stretches": [[[s.begin, s.end] for s in placement.chunks(rank)] for rank in range(ranks)],
                    "exchanges": plan.schedule.exchanges,
                    "why": plan.schedule.why,
                    "pairs": plan.pairs,
                    "received": plan.received,
                    "sent": [each.sent_bytes for each in plan.volumes],
                }
            records.append(kind)
        return records


def _layers(module: LightningModule) -> list[Any]:
    """Return the attention layers of this package inside a module."""
    return [each for each in module.modules() if isinstance(each, AttentionLayer)]
