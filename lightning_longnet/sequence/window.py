"""Micro-batches whose gradients are accumulated, and are to count by their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class TokenWindow:
    """Open from the first of the micro-batches to the last: each of their means then has the first one's divisor."""

    def __init__(self) -> None:
        self._counts: list[Tensor] | None = None

    def open(self) -> None:
        """If it is not."""
        if self._counts is None:
            self._counts = []

    @property
    def means(self) -> int:
        """How many were taken while it is open."""
        return 0 if self._counts is None else len(self._counts)

    def divisor(self, count: Tensor) -> Tensor:
        """Of a sum over so many tokens, for its gradient."""
        if self._counts is None:
            return count
        self._counts.append(count)
        return self._counts[0].clamp(min=1)

    def close(self, micro_batches: int) -> float:
        """What gradients are to be multiplied with, where each loss was divided by `micro_batches`."""
        counts, self._counts = self._counts, None
        if not counts:
            return 1.0
        total = torch.stack(counts).sum()
        return float(micro_batches * counts[0].clamp(min=1) / total) if total > 0 else 1.0
