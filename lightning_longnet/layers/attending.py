"""`AttentionLayer`: the base of the attention layers, which calls `attend` on whole sequences or on parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_longnet.attention.attend import attend
from lightning_longnet.layers.options import exchange_of, kernel_name, mix_of, ordering_of, probability
from lightning_longnet.layers.positions import checked_positions, document_index

if TYPE_CHECKING:
    from lightning_longnet.attention.guard import Guard
    from lightning_longnet.attention.parallel.schedule import Exchange
    from lightning_longnet.attention.pattern.ordering import Ordering
    from lightning_longnet.attention.pattern.pattern import Pattern
    from lightning_longnet.attention.prepared import AttendOptions
    from lightning_longnet.attention.spec import Mix
    from lightning_longnet.sequence.context import SequenceContext


def places_of(x: Tensor, documents: Tensor | None, context: SequenceContext | None) -> Tensor:
    """Return the index of each token of x (B, N, ...) in its document, (N,) or (B, N), in whole or split sequences."""
    if documents is not None:
        documents = checked_positions(documents, x, "documents")
    if context is not None and context.is_split:
        split: Tensor = context.places_of(x, documents)
        return split
    if documents is not None:
        return document_index(documents)
    return torch.arange(x.shape[1], device=x.device)


class AttentionLayer(nn.Module):
    """A layer that attends.  A strategy, or `attach_context`, sets its `sequence_context` and `layer_number`.

    Attributes:
        guard: the `Guard` whose preflight runs before the first call of each kind, or None.
    """

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
        self._sequence_context: SequenceContext | None = None
        self._excluded: dict[tuple[Any, ...], frozenset[str]] = {}  # by the kinds of calls that had their preflight

    @property
    def sequence_context(self) -> SequenceContext | None:
        """The context that the layer splits its work by; None where it takes whole sequences."""
        return self._sequence_context

    @sequence_context.setter
    def sequence_context(self, context: SequenceContext | None) -> None:
        self._sequence_context = context
        self._excluded.clear()  # other ranks must agree on other kernels

    @property
    def is_split(self) -> bool:
        """Whether this rank has a part of the sequences now."""
        return self.sequence_context is not None and self.sequence_context.is_split

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, documents: Tensor | None, padding: Tensor | None
    ) -> Tensor:
        """Attend with the options of the layer, over the ranks that share sequences where they are split."""
        context, dropout = self.sequence_context, self.dropout if self.training else 0.0
        options: AttendOptions
        if context is None:
            options = {"documents": documents, "key_padding_mask": padding, "dropout": dropout}
        else:
            options = context.attend_options(
                q.shape[1], documents, padding, dropout=dropout, layer=self.layer_number, exchange=self.exchange
            )
        options |= {"mix": self.mix, "kernel": self.kernel, "ordering": self.ordering}
        if self.guard is not None:
            kind = "shard" in options, q.device, q.dtype, dropout > 0
            if kind not in self._excluded:
                is_placed = context is not None and context.mesh is not None
                self._excluded[kind] = self.guard.preflight(q, k, v, pattern, is_placed=is_placed, **options)
            options["excluded_kernels"] = self._excluded[kind]
        return attend(q, k, v, pattern, **options)


def guards_of(module: nn.Module) -> list[Guard]:
    """Return the guards of the attention layers inside a module, each once."""
    layers = [layer for layer in module.modules() if isinstance(layer, AttentionLayer)]
    return list(dict.fromkeys(layer.guard for layer in layers if layer.guard is not None))
