"""Gradient accumulation in which each token, not each micro-batch, has the same weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class TokenWindow:
    """The counts of tokens of the micro-batches that are accumulated into one optimizer step.

    While it is open, `token_mean` divides the gradient of each micro-batch by the tokens of the first one, as the
    number of all tokens is not known yet.  `close` returns the factor that makes it a division by all of them.  With
    `accumulate="tokens"` the strategy opens it before each micro-batch, and closes it after the last backward of a
    step.
    """

    def __init__(self) -> None:
        self._counts: list[Tensor] | None = None  # of each micro-batch, over all ranks; None while closed

    def open(self) -> None:
        """Open the window, or leave it as it is if a micro-batch before this one has opened it."""
        if self._counts is None:
            self._counts = []

    @property
    def means(self) -> int:
        """How many calls of `token_mean` with a gradient there were since the window was opened; 0 while closed.

        `SplitSteps.training_step` reads it before and after the module's step, which must call it once.
        """
        return 0 if self._counts is None else len(self._counts)

    def divisor(self, count: Tensor) -> Tensor:
        """Return what the gradient of a mean over `count` tokens is divided by; `token_mean` calls it.

        It is `count` while the window is closed, and otherwise the count of the first micro-batch, at least 1.
        """
        if self._counts is None:
            return count
        self._counts.append(count)
        return self._counts[0].clamp(min=1)

    def close(self, micro_batches: int) -> float:
        """Close the window, and return the factor by which to multiply the accumulated gradients.

        It is 1 if the window was closed, or if there was no token.  It reads the counts, which waits for a GPU.
        `SplitSteps.post_backward` calls it after the last backward of a step, and `SplitSteps.setup` for a window that
        an interrupted run has left open.

        Args:
            micro_batches: the number by which Lightning has divided the loss of each micro-batch.
        """
        counts, self._counts = self._counts, None
        if not counts:
            return 1.0
        total = torch.stack(counts).sum()
        return float(micro_batches * counts[0].clamp(min=1) / total) if total > 0 else 1.0
