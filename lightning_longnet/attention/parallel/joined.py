"""Packed rows with different documents as one long row, so that equal documents of all rows share kernel calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_longnet.attention.parallel.exchange import ExchangeCall


class JoinedCall(NamedTuple):
    """A call of attention on the rows of a batch, one behind the other; its results are those of the rows.

    `unsharded_call` makes it where rows have different documents, and the operators of op.py call it.  `inner` is the
    call on the long row (1, B * N, H, D), in which no document reaches from one row of the batch into the next.
    """

    inner: ExchangeCall

    @property
    def saves_inputs(self) -> bool:
        """The same as that of the call on the long row."""
        return self.inner.saves_inputs

    @property
    def saved_count(self) -> int:
        """The same as that of the call on the long row."""
        return self.inner.saved_count

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return out (B, N, H, Dv), lse (B, H, N), and the tensors that the backward of the long row needs besides."""
        out, lse, saved = self.inner.forward(_joined(q), _joined(k), _joined(v))
        rows = lse[0].unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()
        return out[0].unflatten(0, q.shape[:2]), rows, saved

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, saved: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv, each (B, N, heads, D), from those of the long row."""
        long_lse = lse.transpose(0, 1).flatten(1)[None]
        long_grad, long_q, long_k, long_v, long_out = (_joined(x) for x in (grad, q, k, v, out))
        gradients = self.inner.backward(long_grad, long_q, long_k, long_v, long_out, long_lse, saved)
        dq, dk, dv = (x[0].unflatten(0, q.shape[:2]) for x in gradients)
        return dq, dk, dv


def _joined(x: Tensor) -> Tensor:
    """Return (1, B * N, H, D) of x (B, N, H, D): a view where the rows are one behind the other in memory."""
    return x.flatten(0, 1)[None]
