"""Metrics of a language model, computed from sums of losses, so exact for any split of the tokens over ranks."""

from __future__ import annotations

from math import log
from typing import TYPE_CHECKING, Any

import torch
from torchmetrics import Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


class MeanLoss(Metric):
    """A torchmetrics Metric of the mean loss over all tokens of all ranks; each rank adds the tokens that it holds.

    >>> metric = MeanLoss()
    >>> metric.update(torch.tensor(6.0), 3)
    >>> metric.update(torch.tensor(2.0), 1)
    >>> metric.compute()
    tensor(2., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    loss_sum: Tensor
    token_count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("loss_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("token_count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        """Move the state to the device that `fn` moves tensors to, but keep its float64.

        torch calls it for `module.to(...)`.  `fn` may also convert to bfloat16, as in `module.bfloat16()`; counting by
        ones in bfloat16 stops at 256.
        """

        def move(x: Tensor) -> Tensor:
            return x.to(fn(x.new_empty(0)).device)

        return super()._apply(move, exclude_state)

    def update(self, loss_sum: Tensor, token_count: Tensor | float) -> None:
        """Add a sum of losses in nats, and the number of tokens in it."""
        self.loss_sum += loss_sum.detach()
        self.token_count += token_count

    def compute(self) -> Tensor:
        """Return the mean loss in nats per token."""
        return self.loss_sum / self.token_count


class Perplexity(MeanLoss):
    """The exponential of the mean loss.  Unlike torchmetrics' class it takes sums of losses, not the logits.

    >>> metric = Perplexity()
    >>> metric.update(torch.tensor(2.0).log() * 5, 5)
    >>> round(metric.compute().item(), 6)
    2.0
    """

    def compute(self) -> Tensor:
        """Return the perplexity, e to the mean loss in nats."""
        return super().compute().exp()


class BitsPerByte(MeanLoss):
    """The mean loss of all ranks' tokens in bits per byte of the text.

    Args:
        bytes_per_token: average number of bytes of the text per token; 1 where tokens are bytes.
    """

    def __init__(self, bytes_per_token: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not bytes_per_token > 0:
            raise ValueError(f"bytes_per_token must be positive, got {bytes_per_token!r}")
        self.bytes_per_token = float(bytes_per_token)

    def compute(self) -> Tensor:
        """Return the bits per byte."""
        return super().compute() / (log(2) * self.bytes_per_token)
