"""Calls of a pattern whose branches are drawn on several lines: each on rows in another order."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lightning_longnet.attention.kernels.partial import finalized

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_longnet.attention.parallel.reordering import RowOrder
    from lightning_longnet.attention.parallel.rounds import RoundsCall


class LinesCall(NamedTuple):
    """One forward or backward of the branches of several lines.

    `unsharded_call` and the plans of exchanges make it; the operators of op.py call it through a `ReorderedCall` or an
    `AllToAllCall`.  The partials of the lines are brought into the order of the first one and merged by their lse.  The
    backward of each line takes the out and lse of the whole softmax, as that of each block does.

    `first` is the call of the first line; `others` are those of the other lines, with the order of their rows.
    """

    first: RoundsCall
    others: tuple[tuple[RowOrder, RoundsCall], ...]

    @property
    def saves_inputs(self) -> bool:
        """False: the backward reads q, k, v and out."""
        return False

    @property
    def saved_count(self) -> int:
        """The number of tensors that the forwards of all lines save."""
        return self.first.saved_count + sum(call.saved_count for _, call in self.others)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return out, lse and the saved tensors of all lines; q, k and v are in the order of the first line."""
        total, saved = self.first.partial(q, k, v)
        for order, call in self.others:
            line_q, line_k, line_v = order.reorder(q, k, v)
            partial, line_saved = call.partial(line_q, line_k, line_v)
            out, lse = order.restore(*partial)
            total.add_(out, lse)
            saved += line_saved
        return *finalized(total, q, self.first.options.sinks), saved

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, saved: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums of dq, dk and dv over the lines, in the order of the first line."""
        done = self.first.saved_count  # `saved` holds the tensors of the lines one after the other
        totals = [x.total for x in self.first.gradients(grad, q, k, v, out, lse, saved[:done])]
        for order, call in self.others:
            line_grad, line_q, line_k, line_v, line_out = order.reorder(grad, q, k, v, out)
            (line_lse,) = order.reorder(lse.transpose(1, 2))
            line_saved = saved[done : done + call.saved_count]
            gradients = call.gradients(
                line_grad, line_q, line_k, line_v, line_out, line_lse.transpose(1, 2), line_saved
            )
            done += call.saved_count
            for total, line_total in zip(totals, order.restore(*(x.total for x in gradients)), strict=True):
                total.add_(line_total)
        dq, dk, dv = (totals.pop(0).to(q.dtype) for _ in range(3))
        return dq, dk, dv
