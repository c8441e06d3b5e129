"""The configurations of the ancestor: frozen dataclasses that check their values when they are made."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from typing import Any, Literal

from lightning_longnet.attention.pattern.pattern import Pattern
from lightning_longnet.layers.options import positive_integer, probability
from lightning_longnet.layers.presets import nearest


@dataclass(frozen=True)
class SparsePatternConfig:
    """The choice of blocks of a block-sparse pattern; see `Pattern.block_sparse`.

    `sparsity_ratio` determines the number of blocks, of windows too.
    """

    pattern_type: Literal["local_window", "dilated_sparse", "global_local", "strided"] = "local_window"
    block_size: int = 64
    sparsity_ratio: float = 0.1
    window_size: int | None = None
    local_window_size: int | None = None
    dilation_rates: list[int] | None = None
    global_tokens: int | None = None

    def __new__(cls, *_: Any, **given: Any) -> SparsePatternConfig:
        check_names(cls.__name__, given, [each.name for each in fields(cls)])
        return super().__new__(cls)

    def blocks(self) -> dict[str, Any]:
        """Return keyword arguments of `Pattern.block_sparse`; warn of fields without effect."""
        unused = [
            name for name in ("window_size", "local_window_size", "dilation_rates") if getattr(self, name) is not None
        ]
        if unused:
            reason = "as many blocks are kept as sparsity_ratio says, and it determines their distances"
            warnings.warn(f"SparsePatternConfig has no use for {', '.join(unused)}: {reason}", stacklevel=5)
        options = {"kind": self.pattern_type, "block_size": self.block_size, "sparsity_ratio": self.sparsity_ratio}
        return options | ({} if self.global_tokens is None else {"global_tokens": self.global_tokens})


@dataclass(frozen=True)
class RingAttentionConfig:
    """The arguments of the ancestor's classes, with the field names of both of its configurations.

    `dim` is the width of a head, `embed_dim` that of all heads together.
    """

    segment_lengths: tuple[int, ...] | list[int] | None = None
    dilation_rates: tuple[int, ...] | list[int] | None = None
    dropout: float = 0.0
    ring_size: int | None = None
    dim: int | None = None
    heads: int | None = None
    embed_dim: int | None = None
    bias: bool | None = None
    attention_scale: float | None = None
    enable_error_recovery: bool | None = None
    use_hilbert: bool | None = None
    sparse_pattern_config: SparsePatternConfig | dict[str, Any] | None = None
    sparsity_ratio: float | None = None
    block_size: int | None = None
    use_memory_pool: bool | None = None
    memory_pool_size: int | None = None
    use_gradient_checkpointing: bool | None = None
    mixed_precision: bool | None = None
    log_memory_usage: bool | None = None
    hilbert_chunk_size: int | None = None
    use_flash: bool | None = None

    def __new__(cls, *_: Any, **given: Any) -> RingAttentionConfig:
        check_names(cls.__name__, given, [each.name for each in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("ring_size", "dim", "heads", "embed_dim"):
            if getattr(self, name) is not None:
                positive_integer(name, getattr(self, name))
        probability("dropout", self.dropout)
        for name in ("segment_lengths", "dilation_rates"):
            given = getattr(self, name)
            if given is None:
                raise ValueError(f"{name} must be a sequence of integers, got None")
            object.__setattr__(self, name, tuple(given))
        assert self.segment_lengths is not None
        assert self.dilation_rates is not None
        Pattern.dilated(self.segment_lengths, self.dilation_rates)  # raises on invalid values
        if self.embed_dim is not None and self.heads is not None:
            if self.embed_dim % self.heads or self.dim not in (None, self.embed_dim // self.heads):
                shown = f"{self.embed_dim}, {self.heads} and {self.dim}"
                raise ValueError(f"embed_dim must be heads times dim, got {shown}")
            object.__setattr__(self, "dim", self.embed_dim // self.heads)
        elif self.dim is not None and self.heads is not None:
            object.__setattr__(self, "embed_dim", self.dim * self.heads)

    def given(self) -> dict[str, Any]:
        """Return the fields that are not None."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class StandardizedRingConfig(RingAttentionConfig):
    """`RingAttentionConfig` under another name."""


# arguments that some of the ancestor's classes have, with what replaces them where they are not taken
_REPLACED = {
    "sequence_first": "tensors are (B, N, ...), and multihead classes take batch_first",
    "batch_first": "tensors are (B, N, H, D)",
    "pattern_type": "use sparse_config=SparsePatternConfig(pattern_type=...) of a BlockSparse... class",
    "window_size": "use Pattern.window of this package, or sparse_config of a BlockSparse... class",
    "softmax_scale": "use attention_scale",
    "attention_dropout": "use dropout",
    "op": "use DilatedAttention(pattern, kernel=...)",
    "use_adaptive_sparsity": "no pattern is learned here, and sparsity_ratio determines the number of blocks",
    "enable_adaptive": "no pattern is learned here, and sparsity_ratio determines the number of blocks",
    "quality_threshold": "no pattern is learned here, and sparsity_ratio determines the number of blocks",
    "layer_norm_eps": "use layer_norm_eps of a multihead class",
}


def check_names(owner: str, given: dict[str, Any], known: list[str]) -> None:
    """Raise a ValueError for a name in `given` that is not in `known`, with its replacement or the closest match.

    Args:
        owner: the class that the message names.
        given: keyword arguments.
        known: the names that `owner` takes.
    """
    for name in given:
        if name not in known:
            advice = f": {_REPLACED[name]}" if name in _REPLACED else nearest(name, known)
            raise ValueError(f"{owner} takes no {name!r}{advice}")
