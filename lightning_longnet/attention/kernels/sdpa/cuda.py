"""torch's operators for CUDA: flash attention where it can compute a block, else memory-efficient attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from lightning_longnet.attention.kernels.sdpa import efficient, flash

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels import Request
    from lightning_longnet.attention.kernels.call import Call


class _Operator(Protocol):
    """One of torch's operators.

    `refusals` concern a whole call: `note` reads those of each operator, and a call is refused for those of the last
    one.  `serves` concerns one block, of a call that the kernel did not refuse.
    """

    @property
    def name(self) -> str:
        """The name of the operator in `note`."""

    def refusals(self, request: Request) -> list[str]:
        """Return the reasons why the operator can compute no block of a request."""

    def serves(self, q: Tensor, call: Call) -> bool:
        """Return whether the operator can compute a block; the first one that can does."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Return out and lse of one block."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv of one block."""


_OPERATORS: tuple[_Operator, ...] = (flash, efficient)  # in the order of preference; the last one computes every block


def note(request: Request) -> str:
    """Return what the kernel "sdpa" runs on CUDA for a call that it does not refuse; its own `note` calls it."""
    names = [operator.name for operator in _OPERATORS if not operator.refusals(request)]
    return f"torch's attention for CUDA: {', else '.join(names)}"


def refusals(request: Request) -> list[str]:
    """Return the reasons why torch's operators for CUDA cannot compute a request; `refusals` of "sdpa" calls it.

    They are those of the last operator, which must compute whatever block another one does not serve.  With ROCm there
    is one reason.
    """
    if torch.version.hip is not None:
        return ["serves NVIDIA's CUDA, this torch is built for ROCm"]
    return _OPERATORS[-1].refusals(request)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return out (batch, heads, rows, Dv) and lse (batch, heads, rows) of one block; see `BlockKernel`.

    The first operator that serves the block computes it.  The kernel "sdpa" calls it on CUDA, and "cudnn", "flash3"
    and "flash4" for blocks that they do not serve.
    """
    return _serving(q, call).forward(q, k, v, call)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv of one block from the `out` and `lse` of the whole softmax; see `BlockKernel`.

    The kernel "sdpa" calls it on CUDA, and "cudnn", "flash3" and "flash4" for blocks that they do not serve.
    """
    return _serving(q, call).backward(grad, q, k, v, out, lse, call)


def _serving(q: Tensor, call: Call) -> _Operator:
    """Return the first operator that can compute a block."""
    return next(operator for operator in _OPERATORS if operator.serves(q, call))
