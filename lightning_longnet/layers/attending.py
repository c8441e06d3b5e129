"""What the attention layers share: the call of `attend`, for whole sequences and for parts of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_longnet.attention.attend import attend
from lightning_longnet.attention.parallel.reordering import Reordering, order_of_sequence
from lightning_longnet.layers.options import exchange_of, kernel_name, mix_of, ordering_of, probability
from lightning_longnet.layers.positions import checked_positions, document_index

if TYPE_CHECKING:
    from lightning_longnet.attention.checks import Mix
    from lightning_longnet.attention.guard import Guard
    from lightning_longnet.attention.parallel.schedule import Exchange
    from lightning_longnet.attention.pattern.ordering import Ordering
    from lightning_longnet.attention.pattern.pattern import Pattern
    from lightning_longnet.sequence.context import SequenceContext


def places_of(x: Tensor, documents: Tensor | None, context: SequenceContext | None) -> Tensor:
    """Where the tokens of x (B, N, ...) stand in their documents, (N,) or (B, N), whole or in parts."""
    if documents is not None:
        documents = checked_positions(documents, x, "documents")
    if context is not None and context.is_split:
        split: Tensor = context.places_of(x, documents)
        return split
    if documents is not None:
        return document_index(documents)
    return torch.arange(x.shape[1], device=x.device)


class AttentionLayer(nn.Module):
    """A strategy, or `hand_down`, sets `sequence_context` and `layer_number` where sequences are split over ranks."""

    sequence_context: SequenceContext | None = None
    layer_number: int = 0
    ordering: Ordering = "raster"
    guard: Guard | None = None

    def __init__(
        self,
        dropout: float,
        mix: Mix,
        kernel: str,
        exchange: Exchange | None,
        ordering: Ordering = "raster",
        guard: Guard | None = None,
    ) -> None:
        super().__init__()
        self.dropout = probability("dropout", dropout)
        self.mix, self.kernel, self.exchange = mix_of(mix), kernel_name(kernel), exchange_of(exchange)
        self.ordering, self.guard = ordering_of(ordering), guard

    @property
    def is_split(self) -> bool:
        """Is this rank given a part of the sequences now?"""
        return self.sequence_context is not None and self.sequence_context.is_split

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, documents: Tensor | None, hidden: Tensor | None
    ) -> Tensor:
        if self.ordering == "raster":
            return self._attended_in_order(q, k, v, pattern, documents, hidden)
        line: Reordering = self._line(q, k, v, pattern, documents, hidden)
        if hidden is not None:
            hidden = self._hidden_in_order(hidden, line)
        q, k, v = line.there(q, k, v)
        return line.back(self._attended_in_order(q, k, v, pattern, None, hidden))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _line(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, documents: Tensor | None, hidden: Tensor | None
    ) -> Reordering:
        """The order that the pattern is drawn on, for whole sequences or for parts."""
        context = self.sequence_context
        shard = None if context is None or not context.is_split else context.shard_of()
        length = q.shape[1] if shard is None else shard.length
        here = length if shard is None else shard.placement.lengths[shard.rank]
        try:
            if q.shape[1] != here:
                raise ValueError(f"q must have the {here} tokens of each sequence that are here, got {q.shape[1]}")
            for name, x in (("k", k), ("v", v)):
                if x.shape[:2] != q.shape[:2]:
                    told = f"{tuple(q.shape[:2])}, got {tuple(x.shape[:2])}"
                    raise ValueError(f"{name} must have the batch and tokens of q, {told}")
            if documents is not None:
                raise ValueError(f"documents must be None where ordering is {self.ordering!r}: its curve runs over all")
            if hidden is not None and (hidden.dtype != torch.bool or hidden.shape != q.shape[:2]):
                wanted, got = tuple(q.shape[:2]), f"{hidden.dtype} {tuple(hidden.shape)}"
                raise ValueError(f"key_padding_mask must be bools of shape {wanted}, got {got}")
            order, inverse = order_of_sequence(self.ordering, length, pattern, q.device)
        except ValueError as error:
            if shard is not None:
                shard.check({}, fault=str(error))  # the other ranks wait for this one
            raise
        return Reordering(order, inverse, f"{self.ordering} {pattern.dumps() if pattern.is_causal else ''}", shard)

    def _hidden_in_order(self, hidden: Tensor, line: Reordering) -> Tensor:
        def convert() -> Tensor:
            return line.there(hidden.to(torch.uint8))[0].bool()

        # the layers of a model are handed one mask: let them have one shard
        return convert() if self.sequence_context is None else self.sequence_context.once(hidden, line.name, convert)

    def _attended_in_order(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, documents: Tensor | None, hidden: Tensor | None
    ) -> Tensor:
        told: dict[str, Any] = {
            "documents": documents,
            "key_padding_mask": hidden,
            "dropout": self.dropout if self.training else 0.0,
            "mix": self.mix,
            "kernel": self.kernel,
        }
        if self.sequence_context is None:
            if self.guard is not None:
                guarded: Tensor = self.guard.attend(q, k, v, pattern, **told)
                return guarded
            out: Tensor = attend(q, k, v, pattern, **told)
            return out
        return self.sequence_context.attend(
            q, k, v, pattern, layer=self.layer_number, exchange=self.exchange, guard=self.guard, **told
        )
