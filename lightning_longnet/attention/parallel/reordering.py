"""Attention along another line than the sequence: rows travel into its order before a call, and back after it."""

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
    """Brings tensors (B, L, ...) into an order of rows and back."""

    @property
    def saves_rows(self) -> bool:
        """Whether the backward needs the reordered tensors of the forward, since to reorder them again is costly."""

    def reorder(self, *tensors: Tensor) -> list[Tensor]:
        """Return the tensors in the order."""

    def restore(self, *tensors: Tensor) -> list[Tensor]:
        """Return tensors that are in the order as the sequence has them."""


class LocalOrder(NamedTuple):
    """The order of whole sequences, with its inverse."""

    order: Tensor
    inverse: Tensor
    saves_rows: bool = False

    @classmethod
    def between(cls, source: Line, target: Line, device: torch.device) -> LocalOrder:
        """Return the order that brings rows of one line into another."""
        order, inverse = target.order_from(source)
        return cls(order.to(device), inverse.to(device))

    def reorder(self, *tensors: Tensor) -> list[Tensor]:
        return [x.index_select(1, self.order) for x in tensors]

    def restore(self, *tensors: Tensor) -> list[Tensor]:
        return [x.index_select(1, self.inverse) for x in tensors]


class RowTrade(NamedTuple):
    """For each rank, which of this rank's tokens it takes, and at which places of this rank its own tokens are put."""

    taken: dict[int, Tensor]
    placed: dict[int, Tensor]


class RankOrder(NamedTuple):
    """The order of sequences that are split: each row travels to the rank that holds its place on the line."""

    comm: Comm
    message: MessageContext
    trade: RowTrade
    saves_rows: bool = True

    def reorder(self, *tensors: Tensor) -> list[Tensor]:
        return self._moved(tensors, self.trade.taken, self.trade.placed, "rows into the order")

    def restore(self, *tensors: Tensor) -> list[Tensor]:
        return self._moved(tensors, self.trade.placed, self.trade.taken, "rows out of the order")

    def _moved(
        self, tensors: Sequence[Tensor], taken: dict[int, Tensor], placed: dict[int, Tensor], content: str
    ) -> list[Tensor]:
        """Send the rows of all tensors, which have one type, to each rank in one message.

        Rows are packed for each message and unpacked into the results, so that no copy of all rows is held besides.
        """
        results = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
        widths = [len(x) * x.shape[2:].numel() for x in tensors]
        send, receive = {}, {}
        for rank, rows in taken.items():
            rows = rows.to(tensors[0].device)
            if rank == self.comm.rank:
                for x, result in zip(tensors, results, strict=True):
                    result[:, placed[rank].to(x.device)] = x[:, rows]
            elif len(rows):
                send[rank] = torch.cat([x[:, rows].transpose(0, 1).flatten(1) for x in tensors], 1)
        for rank, rows in placed.items():
            if rank != self.comm.rank and len(rows):
                receive[rank] = tensors[0].new_empty((len(rows), sum(widths)))
        self.comm.exchange(send, receive, self.message, content).wait()
        del send
        for rank, packed in receive.items():
            rows = placed[rank].to(packed.device)
            for result, piece in zip(results, packed.split(widths, 1), strict=True):
                result[:, rows] = piece.unflatten(1, (len(result), *result.shape[2:])).transpose(0, 1)
        return results


def row_trade(order: Tensor, shard: SequenceShard) -> RowTrade:
    """Return which rows a rank sends and receives so that it holds its places of the order."""
    order = order.cpu()
    holder, index = torch.empty_like(order), torch.empty_like(order)
    tokens_of = [shard.tokens(rank) for rank in range(shard.comm.ranks)]
    for rank, tokens in enumerate(tokens_of):
        holder[tokens] = rank
        index[tokens] = torch.arange(len(tokens))
    taken, placed = {}, {}
    for rank, tokens in enumerate(tokens_of):
        needed = order[tokens]
        taken[rank] = index[needed[holder[needed] == shard.rank]]
        placed[rank] = (holder[order[tokens_of[shard.rank]]] == rank).nonzero().squeeze(1)
    return RowTrade(taken, placed)


class ReorderedCall(NamedTuple):
    """A call on rows in another order.  `returns_lse`: whether the caller reads lse, which costs a message."""

    inner: ExchangeCall
    order: RowOrder
    returns_lse: bool

    @property
    def saves_inputs(self) -> bool:
        return self.order.saves_rows

    @property
    def saved_count(self) -> int:
        return self.inner.saved_count + 5 * self.order.saves_rows

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        rows = self.order.reorder(q, k, v)
        out, lse, saved = self.inner.forward(*rows)
        (own_out,) = self.order.restore(out)
        if self.returns_lse or not self.order.saves_rows:
            (wide,) = self.order.restore(lse.transpose(1, 2).unsqueeze(-1))
            own_lse = wide.squeeze(-1).transpose(1, 2).contiguous()
        else:
            own_lse = torch.empty_like(lse)
        return own_out, own_lse, [*rows, out, lse, *saved] if self.order.saves_rows else saved

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, saved: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.order.saves_rows:
            q, k, v, out, lse, *saved = saved
        else:
            q, k, v, out = self.order.reorder(q, k, v, out)
            (wide,) = self.order.reorder(lse.transpose(1, 2))
            lse = wide.transpose(1, 2)
        (grad,) = self.order.reorder(grad)
        gradients = self.inner.backward(grad, q, k, v, out, lse, saved)
        dq, dk, dv = self.order.restore(*gradients)
        return dq, dk, dv
