"""Accumulation over micro-batches that count by their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class TokenWindow:
    """Gives the means of accumulated micro-batches one divisor, and at the end a factor that corrects it to all tokens.

    It is open from the first of the micro-batches to the last.
    """

    def __init__(self) -> None:
        self._counts: list[Tensor] | None = None

    def open(self) -> None:
        """Open the window where it is closed."""
        if self._counts is None:
            self._counts = []

    @property
    def means(self) -> int:
        """The number of means that were taken in the window."""
        return 0 if self._counts is None else len(self._counts)

    def divisor(self, count: Tensor) -> Tensor:
        """Return the divisor of a sum over `count` tokens, for its gradient: in a window, the first count."""
        if self._counts is None:
            return count
        self._counts.append(count)
        return self._counts[0].clamp(min=1)

    def close(self, micro_batches: int) -> float:
        """Close the window, and return the factor of gradients whose losses were each divided by `micro_batches`."""
        counts, self._counts = self._counts, None
        if not counts:
            return 1.0
        total = torch.stack(counts).sum()
        return float(micro_batches * counts[0].clamp(min=1) / total) if total > 0 else 1.0
