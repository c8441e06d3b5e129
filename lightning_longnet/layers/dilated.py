"""Attention over a pattern as a module without projections: the caller computes queries, keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_longnet.attention.guard import Guard  # noqa: TC001
from lightning_longnet.attention.parallel.schedule import Exchange  # noqa: TC001
from lightning_longnet.attention.pattern.lines import check_ordering
from lightning_longnet.attention.pattern.ordering import Ordering  # noqa: TC001
from lightning_longnet.attention.pattern.pattern import Pattern  # noqa: TC001
from lightning_longnet.attention.spec import Mix  # noqa: TC001  for typing.get_type_hints
from lightning_longnet.layers.attending import AttentionLayer
from lightning_longnet.layers.options import pattern_of, positive_number, shown_pattern
from lightning_longnet.layers.signatures import LAYER, refuse_former

if TYPE_CHECKING:
    from torch import Tensor


class DilatedAttention(AttentionLayer):
    """`attend` as a module without parameters.  A strategy, or `attach_context`, sets its `sequence_context`.

    Args:
        pattern: the keys that each query attends to, as a Pattern or the dictionary of `Pattern.to_dict`.
        dropout: probability of dropping an attention weight, in training.
        scale: factor of the scores; 1 / sqrt(head_dim) by default.
        mix: "exact" or "detached"; see `attend`.
        kernel: "auto", or the name of a kernel; see `explain`.
        exchange: how keys reach the queries of other ranks where sequences are split; see `attend`.  None leaves the
            choice to the strategy.
        ordering: the order of tokens that the pattern applies to: "raster", the order of the sequence, or "hilbert", a
            Hilbert curve over the sequence; see `sequence_hilbert_order`.
        guard: a `Guard`, which tries kernels before they are used and reports which one fails; None has none.

    >>> layer = DilatedAttention(Pattern.dilated((128, 512), (1, 4)))
    >>> q, k, v = torch.randn(3, 1, 1000, 4, 16).unbind()
    >>> layer(q, k, v, is_causal=True).shape
    torch.Size([1, 1000, 4, 16])
    """

    @refuse_former(LAYER, "DilatedAttention")
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
        """Return the attention output (B, N, H, D).

        Where sequences are split over ranks, N counts the tokens of this rank.

        Args:
            query: (B, N, H, D).
            key: (B, N, Hkv, D).
            value: (B, N, Hkv, D).
            is_causal: True makes every branch of the pattern causal; False takes the pattern as it is.
            documents: integers (N,) or (B, N), the id of each token's document, not decreasing.  A token attends only
                within its document.
            key_padding_mask: bools (B, N), True where a key is ignored.
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
