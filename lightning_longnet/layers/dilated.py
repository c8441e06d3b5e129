"""Attention over a pattern, and nothing besides: queries, keys and values come from elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_longnet.attention.guard import Guard  # noqa: TC001
from lightning_longnet.attention.parallel.schedule import Exchange  # noqa: TC001
from lightning_longnet.attention.pattern.ordering import (
    Ordering,
    check_ordering,
)
from lightning_longnet.attention.pattern.pattern import Pattern  # noqa: TC001
from lightning_longnet.attention.spec import Mix  # noqa: TC001  for typing.get_type_hints
from lightning_longnet.layers.attending import AttentionLayer
from lightning_longnet.layers.options import pattern_of, positive_number, shown_pattern

if TYPE_CHECKING:
    from torch import Tensor


class DilatedAttention(AttentionLayer):
    """`attend` as a module without parameters, which a strategy or `hand_down` gives its context.

    Args:
        pattern: which keys a query sees; a Pattern, or the dictionary of `Pattern.to_dict`.
        dropout: of the attention's weights, in training.
        scale: of the scores; 1 / sqrt(head_dim) by default.
        mix: "exact" or "detached"; see `attend`.
        kernel: "auto", or the name of one; see `explain`.
        exchange: where sequences are split over ranks, how keys reach the queries of others; see `attend`.  None leaves
            it to the strategy.
        ordering: of the line that the pattern is drawn on: the sequence itself ("raster"), or a Hilbert curve over it
            ("hilbert"), see `sequence_hilbert_order`.
        guard: tries kernels before they are used, and says what fails; see `Guard`.

    >>> layer = DilatedAttention(Pattern.dilated((128, 512), (1, 4)))
    >>> q, k, v = torch.randn(3, 1, 1000, 4, 16).unbind()
    >>> layer(q, k, v, is_causal=True).shape
    torch.Size([1, 1000, 4, 16])
    """

    def __init__(
        self,
        pattern: Pattern | dict[str, Any],
        *,
        dropout: float = 0.0,
        scale: float | None = None,
        mix: Mix = "exact",
        kernel: str = "auto",
        exchange: Exchange | None = None,
        ordering: Ordering = "raster",
        guard: Guard | None = None,
    ) -> None:
        super().__init__(dropout, mix, kernel, exchange, ordering, guard)
        self.pattern = pattern_of(pattern)
        check_ordering(self.ordering, self.pattern)
        branches = tuple(replace(branch, is_causal=True) for branch in self.pattern.branches)
        self.causal_pattern = replace(self.pattern, branches=branches)
        self.scale = None if scale is None else positive_number("scale", scale)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        *,
        documents: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Queries (B, N, H, D), keys and values (B, N, Hkv, D) to (B, N, H, D); parts where sequences are split.

        Args:
            is_causal: the pattern with every branch causal; otherwise the pattern as it is.
            documents: an id per token, (N,) or (B, N), not decreasing: each document is attended to alone.
            key_padding_mask: (B, N), True where a key is ignored.
        """
        if self.scale is not None:
            query = query * (self.scale * query.shape[-1] ** 0.5)
        pattern = self.causal_pattern if is_causal else self.pattern
        return self._attended(query, key, value, pattern, documents, key_padding_mask)

    def extra_repr(self) -> str:
        return (
            f"{shown_pattern(self.pattern)}, dropout={self.dropout}, exchange={self.exchange!r}, "
            f"ordering={self.ordering!r}, is_guarded={self.guard is not None}"
        )
