"""A warning for hooks that change a batch after it was split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]

from lightning_longnet.sequence.batches import named_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator


class ChangeWatch:
    """Warns once where a training step is given other tensors than the split gave, or tensors changed in place.

    Hooks such as `on_train_batch_start` come between, and see the tokens of one rank: the first five are not those of
    the sequence.  The split check does not call them.
    """

    def __init__(self) -> None:
        self._batch, self._tensors = 0, {}  # type: int, dict[str, tuple[int, int]]
        self._is_over = False

    def record(self, batch: Any) -> None:
        """Record which tensors this rank's part of a training batch has, when it was moved to the device.

        `SplitSteps.batch_to_device` calls it, before Lightning calls hooks such as `on_train_batch_start`.
        """
        if not self._is_over:
            self._batch, self._tensors = id(batch), dict(_tensors(batch))

    def compare(self, batch: Any) -> None:
        """Warn if the batch of a training step has other tensors than when it was recorded, or changed ones.

        `SplitSteps.training_step` calls it.  Another object than the recorded batch is not compared.
        """
        if self._is_over or id(batch) != self._batch:
            return
        tensors = dict(_tensors(batch))
        if names := sorted(name for name in tensors | self._tensors if tensors.get(name) != self._tensors.get(name)):
            self._is_over = True
            rank_zero_warn(
                f"{', '.join(names)} of the batch changed between the split over ranks and the training step, as by "
                f"on_train_batch_start of the module or of a callback.  Such a hook sees the tokens of one rank "
                f"alone, and the split check does not call it: change whole sequences in the dataset or in "
                f"on_before_batch_transfer, or call sequence_context(module).positions_of(x)",
                category=RuntimeWarning,
            )


def _tensors(batch: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield (name, (id, version)) for each tensor: they change if it is replaced or written to in place.

    Torch counts no versions of inference tensors; theirs is -1.
    """
    for path, x in named_tensors(batch):
        yield ".".join(path[1:]) or path[0], (id(x), -1 if x.is_inference() else x._version)
