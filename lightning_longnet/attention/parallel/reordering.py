"""Attention over tokens in another order, a `Line`: rows are brought into it before a call, and back after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_longnet.attention.parallel.comm import Comm, MessageContext
    from lightning_longnet.attention.parallel.exchange import ExchangeCall
    from lightning_longnet.attention.parallel.shard import SequenceShard
    from lightning_longnet.attention.pattern.lines import Line


class RowOrder(Protocol):
    """Brings tensors (B, L, ...) into an order of rows and back; `ReorderedCall` and `LinesCall` call it.

    A `LocalOrder` does it for whole sequences, a `RankOrder` for sequences that are split.
    """

    @property
    def saves_rows(self) -> bool:
        """Whether the forward saves its reordered tensors for the backward, as reordering them again is costly.

        `ReorderedCall` asks.
        """

    def reorder(self, *tensors: Tensor) -> list[Tensor]:
        """Return tensors (B, L, ...) with their rows in this order, given in that of the sequence or the first line."""

    def restore(self, *tensors: Tensor) -> list[Tensor]:
        """Return tensors (B, L, ...) whose rows are in this order as they were before `reorder`."""


class LocalOrder(NamedTuple):
    """The order of whole sequences, with its inverse: a `RowOrder` on one process, or of a rank's heads with "swap".

    Row i of a reordered tensor is row `order[i]` of the given one, and row i of a restored one row `inverse[i]`; both
    are (N,).
    """

    order: Tensor
    inverse: Tensor
    saves_rows: bool = False

    @classmethod
    def between(cls, source: Line, target: Line, device: torch.device) -> LocalOrder:
        """Return the order that brings rows of the line `source` into that of `target`.

        `unsharded_call` and `AllToAllPlan.call` make one for each line but the first, which is the source.
        """
        order, inverse = target.order_from(source)
        return cls(order.to(device), inverse.to(device))

    def reorder(self, *tensors: Tensor) -> list[Tensor]:
        """Return the tensors with their rows, dim 1, in the order."""
        return [x.index_select(1, self.order) for x in tensors]

    def restore(self, *tensors: Tensor) -> list[Tensor]:
        """Return tensors that are in the order with their rows, dim 1, as they were."""
        return [x.index_select(1, self.inverse) for x in tensors]


class RowExchange(NamedTuple):
    """The rows that a rank sends and receives to bring tensors (B, L, ...) into another order.

    `row_exchange` returns it.

    Attributes:
        sent: for each rank, this one among them, the local indices of the rows that are sent to it.
        received: for each rank the local indices at which the rows from it are written.
    """

    sent: dict[int, Tensor]
    received: dict[int, Tensor]

    def on(self, device: torch.device) -> RowExchange:
        """Return the same rows with their indices on a device, as `row_exchange` plans on the CPU.

        `_row_exchange` and `_line_exchange` call it.
        """
        sent, received = ({rank: x.to(device) for rank, x in side.items()} for side in self)
        return RowExchange(sent, received)


class RankOrder(NamedTuple):
    """The order of sequences that are split: each row travels to the rank that holds its place on the line.

    `distributed_calls` makes one for the first line along a curve, and `RoundsPlan.call` one for each other line.
    """

    comm: Comm
    message: MessageContext
    rows: RowExchange
    saves_rows: bool = True

    def reorder(self, *tensors: Tensor) -> list[Tensor]:
        """Return the tensors in the order: all ranks exchange rows, so that all must call it together."""
        return self._exchange_rows(tensors, self.rows.sent, self.rows.received, "rows into the order")

    def restore(self, *tensors: Tensor) -> list[Tensor]:
        """Return tensors that are in the order as they were before `reorder`; all ranks call it together."""
        return self._exchange_rows(tensors, self.rows.received, self.rows.sent, "rows out of the order")

    def _exchange_rows(
        self, tensors: Sequence[Tensor], sent: dict[int, Tensor], received: dict[int, Tensor], content: str
    ) -> list[Tensor]:
        """Return tensors (B, L, ...) in the other order; the rows of all of them go to a rank in one message.

        All ranks call it together, with tensors of one dtype.  Rows are packed for each message and unpacked into the
        results, so that there is never another copy of all rows.
        """
        results = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
        widths = [len(x) * x.shape[2:].numel() for x in tensors]
        send, receive = {}, {}
        for rank, rows in sent.items():
            if rank == self.comm.rank:  # these rows only move on this rank
                for x, result in zip(tensors, results, strict=True):
                    result[:, received[rank]] = x[:, rows]
            elif len(rows):
                send[rank] = torch.cat([x[:, rows].transpose(0, 1).flatten(1) for x in tensors], 1)
        for rank, rows in received.items():
            if rank != self.comm.rank and len(rows):
                receive[rank] = tensors[0].new_empty((len(rows), sum(widths)))
        self.comm.exchange(send, receive, self.message, content).wait()
        del send
        for rank, packed in receive.items():
            rows = received[rank]
            for result, piece in zip(results, packed.split(widths, 1), strict=True):
                result[:, rows] = piece.unflatten(1, (len(result), *result.shape[2:])).transpose(0, 1)
        return results


def row_exchange(order: Tensor, shard: SequenceShard) -> RowExchange:
    """Return the rows that this rank sends and receives to bring tensors into the order of a line.

    It sends no message: each rank calls it alone, for the first line of a pattern (`_row_exchange`) and for each of its
    other lines (`_line_exchange`).  Before, the rank of token i of the sequence holds the row of token i; afterwards it
    holds that of token `order[i]`.

    Args:
        order: (N,) for each place of the line the token whose row goes there, or for the other lines the place on the
            first one.
        shard: which rank holds which token.
    """
    order = order.cpu()
    # of each token: the rank that holds it, and its local index there
    holder, index = torch.empty_like(order), torch.empty_like(order)
    tokens_of = [shard.tokens(rank) for rank in range(shard.comm.ranks)]
    for rank, tokens in enumerate(tokens_of):
        holder[tokens] = rank
        index[tokens] = torch.arange(len(tokens))
    sent, received = {}, {}
    for rank, tokens in enumerate(tokens_of):
        needed = order[tokens]
        # both sides list the rows in the order of the receiver's places
        sent[rank] = index[needed[holder[needed] == shard.rank]]
        received[rank] = (holder[order[tokens_of[shard.rank]]] == rank).nonzero().squeeze(1)
    return RowExchange(sent, received)


class ReorderedCall(NamedTuple):
    """A call of attention on rows in another order; its results are in the order of the sequence.

    `unsharded_call` and `distributed_calls` make it where the pattern is drawn along a curve; the operators of op.py
    call it.

    Attributes:
        inner: the call on the reordered rows.
        order: the order of its rows.
        returns_lse: whether the caller reads the lse; to reorder it costs a message where sequences are split.
    """

    inner: ExchangeCall
    order: RowOrder
    returns_lse: bool

    @property
    def saves_inputs(self) -> bool:
        """Whether the forward saves q, k, v, out and lse in the order: where sequences are split, to save messages."""
        return self.order.saves_rows

    @property
    def saved_count(self) -> int:
        """The number of tensors that the forward saves, with q, k, v, out and lse if the order saves its rows."""
        return self.inner.saved_count + 5 * self.order.saves_rows  # q, k, v, out and lse in the order

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return out and lse in the order of the sequence, and the tensors that the backward needs besides.

        lse is uninitialized where sequences are split and the caller does not read it (`returns_lse`).
        """
        rows = self.order.reorder(q, k, v)
        out, lse, saved = self.inner.forward(*rows)
        (sequence_out,) = self.order.restore(out)
        # an order that saves its rows saves the reordered lse, too: the backward needs no other
        if self.returns_lse or not self.order.saves_rows:
            (lse_rows,) = self.order.restore(lse.transpose(1, 2).unsqueeze(-1))
            sequence_lse = lse_rows.squeeze(-1).transpose(1, 2).contiguous()
        else:
            sequence_lse = torch.empty_like(lse)
        return sequence_out, sequence_lse, [*rows, out, lse, *saved] if self.order.saves_rows else saved

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, saved: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv in the order of the sequence."""
        if self.order.saves_rows:
            q, k, v, out, lse, *saved = saved  # the forward saved them in the order of the inner call
        else:
            q, k, v, out = self.order.reorder(q, k, v, out)
            (lse_rows,) = self.order.reorder(lse.transpose(1, 2))
            lse = lse_rows.transpose(1, 2)
        (grad,) = self.order.reorder(grad)
        gradients = self.inner.backward(grad, q, k, v, out, lse, saved)
        dq, dk, dv = self.order.restore(*gradients)
        return dq, dk, dv
