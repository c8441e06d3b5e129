"""The classes of the ancestor: two base classes, without and with projections, and a subclass for each preset."""

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
from lightning_longnet.layers.options import positive_integer, positive_number

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.layers.attending import AttentionLayer

_PLACES = ("segment_lengths", "dilation_rates", "dropout", "ring_size")
_MULTIHEAD_PLACES = ("embed_dim", "num_heads", *_PLACES[:3])
# arguments that `MultiheadDilatedAttention` takes under the same name
_MULTIHEAD = ("bias", "add_bias_kv", "add_zero_attn", "kdim", "vdim", "batch_first", "device", "dtype")

# arguments that it takes as `sub_norm` and `gain`
_MAGNETO = ("layer_norm", "gamma_init")
_NORM_EPS = 1e-5  # that of `sub_norm`
_OTHERS = ("gate_fn", "layer_norm_eps", "sequence_first")


class RingAttention(DilatedAttention):
    """The base of the ancestor's classes without projections: a `DilatedAttention` with the ancestor's arguments.

    Queries, keys and values are (B, N, H, D), and `is_causal` is an argument of the call.

    Args:
        arguments: a `RingAttentionConfig`, or segment_lengths, dilation_rates, dropout and ring_size in this order.
        named: the arguments of MIGRATING.md, by name.  `ring_size` is the number of ranks that share a sequence, which
            a strategy or `attach_context` determines; a call on another number of ranks is refused.  `dim` and `heads`
            are the head_dim and number of heads that the query must have.
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
        """Return the attention output (B, N, H, D); see `DilatedAttention.forward`.

        Args:
            query: (B, N, H, D).
            key: (B, N, H, D).
            value: (B, N, H, D).
            is_causal: whether the pattern is causal.
            attention_mask: must be None.
            return_attention_weights: must be False.
            documents: integers (N,) or (B, N), the id of each token's document, not decreasing.
            key_padding_mask: bools (B, N), True where a key is ignored.
        """
        check_ring_size(self, self.ring_size)
        if fault := self._fault(query, attention_mask, return_attention_weights):
            context = self.sequence_context
            if context is not None and context.is_split:  # report the fault to the other ranks, which wait for this one
                context.shard_of(documents, key_padding_mask).check({}, fault=fault)
            raise ValueError(fault)
        return super().forward(query, key, value, is_causal, documents=documents, key_padding_mask=key_padding_mask)

    def _fault(self, query: Tensor, attention_mask: Tensor | None, return_attention_weights: bool) -> str:
        """Return the message for arguments that are refused, or an empty text."""
        if attention_mask is not None:
            return "attention_mask must be None: pass key_padding_mask, documents, or another pattern"
        if return_attention_weights:
            return "return_attention_weights must be False: the weights of N x N pairs are never held"
        if query.dim() == 4:  # `attend` refuses others
            for name, expected, actual in (("heads", self.heads, query.shape[2]), ("dim", self.dim, query.shape[3])):
                if expected not in (None, actual):
                    return f"query must have {name} {expected}, as the layer was given, got shape {tuple(query.shape)}"
        return ""


class RingMultiheadAttention(MultiheadDilatedAttention):
    """The base of the ancestor's classes with projections: a `MultiheadDilatedAttention` with the ancestor's arguments.

    Args:
        arguments: a `RingAttentionConfig`, or embed_dim, num_heads, segment_lengths, dilation_rates and dropout in this
            order.
        named: the arguments of MIGRATING.md and of `nn.MultiheadAttention`, by name.  `batch_first` is True by default.
            `layer_norm` adds MAGNETO's LayerNorm before the output projection, and `gamma_init` is the gain with which
            the projections of v and of the output are initialised.
    """

    preset: ClassVar[str]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        name = type(self).__name__
        given = given_to(name, _MULTIHEAD_PLACES, arguments, named)
        if not isinstance(given.get("layer_norm", False), bool):
            raise ValueError(f"layer_norm must be True or False, got {given['layer_norm']!r}")
        if "gate_fn" in given:
            raise ValueError(f"gate_fn must be None for {name}, got {given['gate_fn']!r}: it has no gate")
        if "attention_scale" in given:
            raise ValueError(f"attention_scale must be None for {name}: its scores are over the root of a head's width")
        if given.get("layer_norm_eps", _NORM_EPS) != _NORM_EPS:
            raise ValueError(f"layer_norm_eps must be {_NORM_EPS}, that of sub_norm, got {given['layer_norm_eps']!r}")
        if "sequence_first" in given:
            given = _with_batch_first(name, given)
        settings = settings_of(name, self.preset, given, WITHOUT_GATE, (*_MULTIHEAD, *_MAGNETO, *_OTHERS))
        heads, dim = expected_shape(given)
        if heads is None or (dim is None and "embed_dim" not in given):
            raise ValueError(f"{name} needs embed_dim and num_heads")
        embed_dim = given.get("embed_dim") or heads * (dim or 0)
        options = {"batch_first": True} | {each: given[each] for each in _MULTIHEAD if each in given}
        options["sub_norm"] = given.get("layer_norm", False)
        options["gain"] = positive_number("gamma_init", given.get("gamma_init", 1.0))
        super().__init__(embed_dim, heads, **options, **settings)
        self.ring_size = _ring_size(given)

    def forward(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, *arguments: Any, **named: Any
    ) -> tuple[Tensor, None]:
        """Return (out, None); see `MultiheadDilatedAttention.forward`.

        The query is also the key and the value if these are None, as in the ancestor.
        """
        check_ring_size(self, self.ring_size)
        key, value = query if key is None else key, query if value is None else value
        return super().forward(query, key, value, *arguments, **named)


def _with_batch_first(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with batch_first instead of sequence_first, its opposite."""
    sequence_first = given["sequence_first"]
    if not isinstance(sequence_first, bool):
        raise ValueError(f"sequence_first must be True or False, got {sequence_first!r}")
    if given.get("batch_first", not sequence_first) is sequence_first:
        raise ValueError(f"{name} was given batch_first and sequence_first, which must differ, got {sequence_first}")
    return {**given, "batch_first": not sequence_first}


def _ring_size(given: dict[str, Any]) -> int | None:
    """Return the checked ring_size, or None if there is none."""
    return positive_integer("ring_size", given["ring_size"]) if "ring_size" in given else None


def check_ring_size(layer: AttentionLayer, ring_size: int | None) -> None:
    """Refuse a ring_size other than the number of ranks that share a sequence.

    All ranks compare the same numbers, so the error is raised on all of them and none waits.
    """
    context = layer.sequence_context
    ranks = context.sequence_parallel_size if context is not None else 1  # also within `whole()`
    if ring_size not in (None, ranks):
        raise ValueError(
            f"ring_size must be the number of ranks that share a sequence, {ranks} here, got {ring_size}: "
            f"RingSequenceParallelStrategy, or sequence_mesh and attach_context, share sequences among {ring_size}"
        )


class RingDilatedAttention(RingAttention):
    """Keys pass around the ranks in a ring; see the preset "ring"."""

    preset = "ring"


class RingDilatedAttentionProduction(RingAttention):
    """The layer has a `Guard`, unless `enable_error_recovery` is False; see the preset "production"."""

    preset = "production"


class RingDilatedAttentionHilbertOptimized(RingAttention):
    """The pattern follows a Hilbert curve, unless `use_hilbert` is False; see the preset "hilbert"."""

    preset = "hilbert"


class RingDilatedAttentionV2Collective(RingAttention):
    """Keys are gathered from all ranks; see the preset "collective"."""

    preset = "collective"


class UlyssesAttention(RingAttention):
    """An all_to_all exchanges tokens for heads; see the preset "ulysses"."""

    preset = "ulysses"


class BlockSparseRingDilatedAttention(RingAttention):
    """The pattern keeps a share of its blocks, `sparsity_ratio`; see the preset "block_sparse"."""

    preset = "block_sparse"


class RingMultiheadDilatedAttentionHybrid(RingMultiheadAttention):
    """`RingDilatedAttention` with projections of q, k, v and the output."""

    preset = "ring"


class BlockSparseRingMultiheadDilatedAttention(RingMultiheadAttention):
    """`BlockSparseRingDilatedAttention` with projections of q, k, v and the output."""

    preset = "block_sparse"
