"""`BatchDocuments`: the documents of batches for models of transformers, under Lightning's own strategies."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_longnet.huggingface.documents import attends_by_ring, has_context_of_user, whole_documents
from lightning_longnet.sequence.attach import attach_context
from lightning_longnet.sequence.batches import named_tensors
from lightning_longnet.sequence.context import SequenceContext

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor


class BatchDocuments(Callback):
    """A callback that gives models with `attn_implementation="ring"` the `documents` of each batch.

    Under this package's strategy it does nothing, as the strategy does so.  Each Trainer has one, by the entry point
    `lightning.pytorch.callbacks_factory` of this package.  Of several, as Trainers that share a list of callbacks have,
    the first acts alone.  If a user attached a context to the module or to one inside it, none acts.
    """

    def __init__(self) -> None:
        self._batch = ExitStack()  # holds the block of `whole_documents` during a batch
        self._module: LightningModule | None = None  # that has such a model, and no other context
        self._attached = self._warned = False

    def _begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Find out at the start of a loop whether this callback is to act on the module."""
        self._batch.close()
        is_ours = isinstance(getattr(trainer.strategy, "sequence_context", None), SequenceContext)
        is_first = self is next((each for each in trainer.callbacks if isinstance(each, BatchDocuments)), None)  # type: ignore[attr-defined]
        self._module = module if is_first and not is_ours and attends_by_ring(module) else None

    def _begin_batch(self, batch: Any, step: str) -> None:
        """Let attention separate the documents of a batch, until its end; `step` is the name of the module's method."""
        self._batch.close()
        if self._module is None or has_context_of_user(self._module):
            return
        if is_param_in_hook_signature(getattr(self._module, step), "dataloader_iter", explicit=True):
            if not self._warned:  # Lightning gives hooks the batch of the step before
                rank_zero_warn(
                    f"{step} takes dataloader_iter, so that attention does not know the documents of its batch: let it "
                    f"take batch and batch_idx, or attach a SequenceContext and compute inside its with_documents()"
                )
            self._warned = True
            return
        documents = documents_of(batch)
        if documents is not None:
            self._attached = True
            self._batch.enter_context(whole_documents(self._module, documents))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batch.close()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begin_batch(batch, "training_step")

    def on_validation_batch_start(self, *arguments: Any, **options: Any) -> None:
        self._begin_batch(options["batch"] if "batch" in options else arguments[2], "validation_step")

    def on_test_batch_start(self, *arguments: Any, **options: Any) -> None:
        self._begin_batch(options["batch"] if "batch" in options else arguments[2], "test_step")

    def on_predict_batch_start(self, *arguments: Any, **options: Any) -> None:
        self._begin_batch(options["batch"] if "batch" in options else arguments[2], "predict_step")

    def on_train_batch_end(self, *_: Any) -> None:
        self._batch.close()

    def on_validation_batch_end(self, *_: Any) -> None:
        self._batch.close()

    def on_test_batch_end(self, *_: Any) -> None:
        self._batch.close()

    def on_predict_batch_end(self, *_: Any) -> None:
        self._batch.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore(pl_module)  # Lightning calls no other hook then

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore(pl_module)

    def _restore(self, module: LightningModule) -> None:
        """Remove the context that `whole_documents` attached to the module."""
        self._batch.close()
        if self._attached and not has_context_of_user(module):
            attach_context(module, None)
        self._module, self._attached = None, False


def documents_of(batch: Any) -> Tensor | None:
    """Return the tensor "documents" of a batch, (N,) or (B, N), or None; a ValueError if it has several that differ."""
    found = [(path, x) for path, x in named_tensors(batch) if path[-1] == "documents"]
    for path, x in found[1:]:
        if not torch.equal(x, found[0][1]):
            names = " and ".join(".".join(each[1:]) for each in (found[0][0], path))
            raise ValueError(
                f"documents of a batch must be the same for all of its sequences where a model attends by "
                f'attn_implementation="ring", got {names}, which differ: give such sequences in batches of their own'
            )
    return found[0][1] if found else None
