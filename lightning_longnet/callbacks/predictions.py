"""`PredictedTexts`: a callback that writes the texts that `predict` has continued, as lines of JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_longnet.sequence import sequence_context

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class PredictedTexts(BasePredictionWriter):
    """Writes {"sample": its number, "text": the whole of it} for each row of tokens (B, N) that `predict_step` returns.

    Each group of ranks that share sequences writes a file into the run's folder, predictions-0.jsonl and so on.
    Predictions that are no rows of tokens, or whose data module cannot `decode`, are not written.

    Args:
        folder: where to write; the run's folder by default.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder
        self._path: Path | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the file of this rank's group, and remove that of an earlier run."""
        folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)
        context = sequence_context(pl_module)
        self._path = folder / f"predictions-{context.data_parallel_rank}.jsonl"
        if context.sequence_parallel_rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append the rows of a prediction to the file, on the first rank of each group; Lightning calls it."""
        data: Any = getattr(trainer, "datamodule", None)
        is_text = isinstance(prediction, Tensor) and prediction.dim() == 2 and not prediction.is_floating_point()
        is_writer = sequence_context(pl_module).sequence_parallel_rank == 0
        if not is_text or not is_writer or not callable(getattr(data, "decode", None)):
            return
        assert self._path is not None
        numbers = batch_indices or [None] * len(prediction)
        with self._path.open("a", encoding="utf-8") as file:
            for number, row in zip(numbers, prediction, strict=True):
                file.write(json.dumps({"sample": number, "text": data.decode(row.cpu())}, ensure_ascii=False) + "\n")
