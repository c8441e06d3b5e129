"""The mean loss at each position of a text, in memory that does not grow with the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BINS = 256


class LossCurve:
    """Sums of losses over bins of positions of equal width, which doubles where a text is longer than all bins.

    >>> curve = LossCurve()
    >>> curve.add(torch.tensor([0, 1, 2]), torch.tensor([3.0, 1.0, 2.0]))
    >>> curve.points()[:2]
    [(0.0, 3.0), (1.0, 1.0)]
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        """Begin a curve, or go on with the `state()` of one."""
        self.width: int = 1 if state is None else state["width"]
        self.sums, self.counts = torch.zeros(2, _BINS, dtype=torch.float64)
        if state is not None:
            held = len(state["sums"])
            self.sums[:held] = torch.tensor(state["sums"], dtype=torch.float64)
            self.counts[:held] = torch.tensor(state["counts"], dtype=torch.float64)

    def add(self, positions: Tensor, losses: Tensor) -> None:
        """Add the losses (n,) of tokens at positions (n,)."""
        if not len(positions):
            return
        while int(positions.max()) >= self.width * _BINS:
            self.width *= 2
            for sums in (self.sums, self.counts):
                sums.copy_(torch.cat([sums.view(-1, 2).sum(1), sums.new_zeros(_BINS // 2)]))
        bins = positions.cpu() // self.width
        self.sums.index_add_(0, bins, losses.to("cpu", torch.float64))
        self.counts.index_add_(0, bins, torch.ones(len(bins), dtype=torch.float64))

    def points(self) -> list[tuple[float, float]]:
        """Return the middle and the mean loss of each bin that has a token."""
        held = self.counts.nonzero().flatten().tolist()
        means = self.sums / self.counts
        return [(i * self.width + (self.width - 1) / 2, float(means[i])) for i in held]

    def state(self) -> dict[str, Any]:
        """Return plain values from which `LossCurve` goes on."""
        held = int(self.counts.nonzero().max()) + 1 if self.counts.any() else 0
        return {"width": self.width, "sums": self.sums[:held].tolist(), "counts": self.counts[:held].tolist()}
