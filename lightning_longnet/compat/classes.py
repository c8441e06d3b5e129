"""The ancestor's classes: a body for those without weights, one for those with projections, and a row for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lightning_longnet.compat.options import (
    WITHOUT_GATE,
    WITHOUT_WEIGHTS,
    expected_shape,
    given_to,
    settings_of,
)
from lightning_longnet.layers import DilatedAttention, MultiheadDilatedAttention
from lightning_longnet.layers.options import positive_integer

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.layers.attending import AttentionLayer

_PLACES = ("segment_lengths", "dilation_rates", "dropout", "ring_size")
_MULTIHEAD_PLACES = ("embed_dim", "num_heads", *_PLACES[:3])
# what our own multihead layer is told by the same name
_MULTIHEAD = ("bias", "add_bias_kv", "add_zero_attn", "kdim", "vdim", "batch_first", "device", "dtype")


class RingAttention(DilatedAttention):
    """An ancestor's attention: queries, keys and values (B, N, H, D), `is_causal` at the call.

    `ring_size` is how many ranks share a sequence; a strategy or `hand_down` makes it so, and what is not so is refused
    at the call.  `dim` and `heads` are what tensors must have.
    """

    preset: ClassVar[str]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        name = type(self).__name__
        given = given_to(name, _PLACES, arguments, named)
        super().__init__(**settings_of(name, self.preset, given, WITHOUT_WEIGHTS), scale=given.get("attention_scale"))
        self.ring_size = _ring_size(given)
        self.heads, self.dim = expected_shape(given)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        attention_mask: Tensor | None = None,
        return_attention_weights: bool = False,
        *,
        documents: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """As `DilatedAttention`."""
        check_ring_size(self, self.ring_size)
        if fault := self._fault(query, attention_mask, return_attention_weights):
            context = self.sequence_context
            if context is not None and context.is_split:  # the other ranks wait for this one
                context.shard_of(documents, key_padding_mask).check({}, fault=fault)
            raise ValueError(fault)
        return super().forward(query, key, value, is_causal, documents=documents, key_padding_mask=key_padding_mask)

    def _fault(self, query: Tensor, attention_mask: Tensor | None, return_attention_weights: bool) -> str:
        if attention_mask is not None:
            return "attention_mask must be None: hand in key_padding_mask, documents, or another pattern"
        if return_attention_weights:
            return "return_attention_weights must be False: the weights of N x N pairs are never held"
        if query.dim() == 4:  # `attend` refuses others
            for name, wanted, found in (("heads", self.heads, query.shape[2]), ("dim", self.dim, query.shape[3])):
                if wanted not in (None, found):
                    return f"query must have {name} {wanted}, as the layer was told, got shape {tuple(query.shape)}"
        return ""


class RingMultiheadAttention(MultiheadDilatedAttention):
    """An ancestor's attention with projections: the words of `nn.MultiheadAttention`, `batch_first` by default."""

    preset: ClassVar[str]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        name = type(self).__name__
        given = given_to(name, _MULTIHEAD_PLACES, arguments, named)
        if given.get("layer_norm"):
            raise ValueError(f"layer_norm must be False for {name}: DilatedSelfAttention(qk_norm=True) norms q and k")
        if "gate_fn" in given:
            raise ValueError(f"gate_fn must be None for {name}, got {given['gate_fn']!r}: it has no gate")
        if "attention_scale" in given:
            raise ValueError(f"attention_scale must be None for {name}: its scores are over the root of a head's width")
        settings = settings_of(name, self.preset, given, WITHOUT_GATE, (*_MULTIHEAD, "layer_norm", "gate_fn"))
        heads, dim = expected_shape(given)
        if heads is None or (dim is None and "embed_dim" not in given):
            raise ValueError(f"{name} needs embed_dim and num_heads")
        embed_dim = given.get("embed_dim") or heads * (dim or 0)
        told = {"batch_first": True} | {each: given[each] for each in _MULTIHEAD if each in given}
        super().__init__(embed_dim, heads, **told, **settings)
        self.ring_size = _ring_size(given)

    def forward(self, *arguments: Any, **named: Any) -> tuple[Tensor, None]:
        """As `MultiheadDilatedAttention`."""
        check_ring_size(self, self.ring_size)
        return super().forward(*arguments, **named)


def _ring_size(given: dict[str, Any]) -> int | None:
    return positive_integer("ring_size", given["ring_size"]) if "ring_size" in given else None


def check_ring_size(layer: AttentionLayer, ring_size: int | None) -> None:
    """The same number on all ranks, and so an error on all of them."""
    context = layer.sequence_context
    ranks = context.sequence_parallel_size if context is not None else 1  # within `whole()`, too
    if ring_size not in (None, ranks):
        raise ValueError(
            f"ring_size must be the number of ranks that share a sequence, {ranks} here, got {ring_size}: "
            f"RingSequenceParallelStrategy, or sequence_mesh and hand_down, share sequences among {ring_size}"
        )


class RingDilatedAttention(RingAttention):
    """Of the first ring."""

    preset = "ring"


class RingDilatedAttentionProduction(RingAttention):
    """With a guard, unless `enable_error_recovery` is False."""

    preset = "production"


class RingDilatedAttentionHilbertOptimized(RingAttention):
    """Along a Hilbert curve, unless `use_hilbert` is False."""

    preset = "hilbert"


class RingDilatedAttentionV2Collective(RingAttention):
    """Keys are gathered."""

    preset = "collective"


class UlyssesAttention(RingAttention):
    """Ranks trade tokens for heads."""

    preset = "ulysses"


class BlockSparseRingDilatedAttention(RingAttention):
    """A share of the blocks, `sparsity_ratio`."""

    preset = "block_sparse"


class RingMultiheadDilatedAttentionHybrid(RingMultiheadAttention):
    """The ring, with projections."""

    preset = "ring"


class BlockSparseRingMultiheadDilatedAttention(RingMultiheadAttention):
    """A share of the blocks, with projections."""

    preset = "block_sparse"
