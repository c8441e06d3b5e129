"""What all models are made of: blocks of attention and feed-forward, their configuration, and the way through them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from lightning_longnet.attention.guard import Guard
from lightning_longnet.attention.parallel.schedule import Exchange  # noqa: TC001
from lightning_longnet.attention.pattern.ordering import (
    Ordering,
    check_ordering,
)
from lightning_longnet.attention.pattern.pattern import Pattern, check_heads
from lightning_longnet.attention.spec import Mix  # noqa: TC001  for the command line's reading of types
from lightning_longnet.layers import DilatedSelfAttention, FeedForward, keep_attention, magneto_gain
from lightning_longnet.layers.feed_forward import Activation  # noqa: TC001
from lightning_longnet.layers.options import (
    class_of,
    ordering_of,
    pattern_of,
    positive_integer,
    positive_number,
    probability,
)
from lightning_longnet.layers.positions import Kind  # noqa: TC001
from lightning_longnet.layers.presets import Preset, preset_of

if TYPE_CHECKING:
    from lightning_longnet.sequence.context import SequenceContext

Recompute = Literal["nothing", "all but attention", "everything"]


@dataclass(frozen=True)
class BlocksConfig:
    """The shape of a model's blocks, in plain values that a YAML file can hold.

    Args:
        pattern: what a token sees; one for all layers, or one for each.
        dim: width of the model.
        layers: how many blocks.
        heads: query heads in each.
        kv_heads: key and value heads, which divide `heads`; as many by default.
        hidden_dim: width inside the feed-forward; see `FeedForward`.
        activation: of the feed-forward: "gelu", "relu", "silu" or "swiglu".
        rotary: "rope", "xpos" or None.
        rope_base: of the wavelengths.
        xpos_scale_base: larger ones fade later; see `RotaryPositions`.
        qk_norm: an RMSNorm over each head of q and of k.
        sub_norm: MAGNETO: LayerNorms inside the blocks, and a gain of the initialisation that goes with them.
        norm_eps: of every LayerNorm.
        bias: of the linear maps in the blocks.
        dropout: of the embeddings, of what each half of a block adds, and of the feed-forward's hidden values.
        attention_dropout: of the attention's weights.
        recompute: what of a block is computed again in the backward rather than held: "nothing", "all but attention" or
            "everything".
        offload_activations: what the backward needs waits for it in the host's memory.
        feed_forward_chunk: tokens that the feed-forward computes at a time; all by default.
        mix: "exact" or "detached"; see `attend`.
        kernel: "auto", or the name of one; see `explain`.
        exchange: where sequences are split over ranks; None leaves it to the strategy.
        ordering: of the line that the pattern is drawn on in every layer: "raster" is the sequence itself, "hilbert" a
            curve over it; see `sequence_hilbert_order`.
        preset: a row of `available_presets()`, which sets exchange, ordering and guard, and of "block_sparse" keeps
            blocks of a pattern that has none; what is given beside it must agree.
        attention: a class of one's own for the layers, {"class_path": "package.Name", "init_args": {...}}: made of
            (dim, heads, pattern, **init_args), and called as `DilatedSelfAttention` is; that one by default, of which
            the values above tell.
    """

    pattern: Pattern | Sequence[Pattern]
    dim: int = 768
    layers: int = 12
    heads: int = 12
    kv_heads: int | None = None
    hidden_dim: int | None = None
    activation: Activation = "gelu"
    rotary: Kind | None = "rope"
    rope_base: float = 10000.0
    xpos_scale_base: float = 512.0
    qk_norm: bool = False
    sub_norm: bool = True
    norm_eps: float = 1e-5
    bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    recompute: Recompute = "nothing"
    offload_activations: bool = False
    feed_forward_chunk: int | None = None
    mix: Mix = "exact"
    kernel: str = "auto"
    exchange: Exchange | None = None
    ordering: Ordering = "raster"
    preset: str | None = None
    attention: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads"):
            positive_integer(name, getattr(self, name))
        check_heads(self.heads, self.kv_heads)
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim, got heads {self.heads} and dim {self.dim}")
        object.__setattr__(self, "norm_eps", epsilon("norm_eps", self.norm_eps))
        probability("dropout", self.dropout)
        ordering_of(self.ordering)
        if self.attention is not None:
            class_of(self.attention)
        if self.recompute not in get_args(Recompute):
            allowed = ", ".join(map(repr, get_args(Recompute)))
            raise ValueError(f"recompute must be one of {allowed}, got {self.recompute!r}")
        given = self.pattern
        is_list = isinstance(given, Sequence) and not isinstance(given, str)
        patterns = tuple(map(pattern_of, given)) if is_list else pattern_of(given)  # type: ignore[arg-type]
        if isinstance(patterns, tuple) and len(patterns) != self.layers:
            raise ValueError(f"pattern must be one, or one for each of the {self.layers} layers, got {len(patterns)}")
        object.__setattr__(self, "pattern", patterns)
        if self.preset is not None:
            self._take(preset_of(self.preset))
        for pattern in self.patterns:
            check_ordering(self.layer_ordering, pattern)

    def _take(self, preset: Preset) -> None:
        """What it sets, unless that contradicts what is given."""
        for name, value, unset in (("exchange", preset.exchange, None), ("ordering", preset.ordering, "raster")):
            given = getattr(self, name)
            if value is None:
                continue
            if given not in (unset, value):
                raise ValueError(f"{name} must be {value!r} with preset={preset.name!r}, got {given!r}")
            object.__setattr__(self, name, value)
        if self.attention is not None:
            raise ValueError(f"attention must be None with preset={preset.name!r}: a preset is of our own layers")
        made = tuple(preset.pattern_of(each) for each in self.patterns)
        object.__setattr__(self, "pattern", made if isinstance(self.pattern, tuple) else made[0])

    @property
    def layer_ordering(self) -> Ordering:
        """What layers do themselves; a model whose tokens form a grid orders them where they enter."""
        return self.ordering

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """One for each layer."""
        return self.pattern if isinstance(self.pattern, tuple) else (self.pattern,) * self.layers  # type: ignore[return-value]

    @property
    def is_causal(self) -> bool:
        return all(pattern.is_causal for pattern in self.patterns)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, of which the same class makes this one again: `LongNetConfig(**values)`."""
        found = asdict(self)
        shown = [pattern.to_dict() for pattern in self.patterns]
        found["pattern"] = shown if isinstance(self.pattern, tuple) else shown[0]
        return found


def epsilon(name: str, value: float | str) -> float:
    """A small number, which YAML 1.1 takes for text where it is written 1e-05."""
    try:
        return positive_number(name, float(value) if isinstance(value, str) else value)
    except ValueError:
        raise ValueError(f"{name} must be a positive, finite number, got {value!r}") from None


class LongNetBlock(nn.Module):
    """Attention and feed-forward, each after a LayerNorm and beside a path that changes nothing."""

    def __init__(self, config: BlocksConfig, pattern: Pattern, guard: Guard | None = None) -> None:
        super().__init__()
        gain = magneto_gain(config.layers) if config.sub_norm else 1.0
        shared: dict[str, Any] = {"bias": config.bias, "sub_norm": config.sub_norm, "gain": gain}
        shared["norm_eps"] = config.norm_eps
        self.attention_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.attention = _attention(config, pattern, shared, guard)
        self.feed_forward_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(
            config.dim,
            config.hidden_dim,
            activation=config.activation,
            dropout=config.dropout,
            chunk_tokens=config.feed_forward_chunk,
            **shared,
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, positions: Tensor | None, documents: Tensor | None, key_padding_mask: Tensor | None
    ) -> Tensor:
        told = {"positions": positions, "documents": documents, "key_padding_mask": key_padding_mask}
        x = x + self.dropout(self.attention(self.attention_norm(x), **told))
        out: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return out


def _attention(config: BlocksConfig, pattern: Pattern, shared: dict[str, Any], guard: Guard | None) -> nn.Module:
    if config.attention is not None:
        made: nn.Module = class_of(config.attention)(
            config.dim, config.heads, pattern, **config.attention.get("init_args", {})
        )
        return made
    return DilatedSelfAttention(
        config.dim,
        config.heads,
        pattern,
        num_kv_heads=config.kv_heads,
        dropout=config.attention_dropout,
        rotary=config.rotary,
        rope_base=config.rope_base,
        xpos_scale_base=config.xpos_scale_base,
        qk_norm=config.qk_norm,
        mix=config.mix,
        kernel=config.kernel,
        exchange=config.exchange,
        ordering=config.layer_ordering,
        guard=guard,
        **shared,
    )


class Blocks(nn.Module):
    """A model's way through its blocks, and what of it is held for the backward.  A model adds both ends.

    A strategy, or `hand_down`, sets `sequence_context` where sequences are split over ranks.  `guard` is what the
    layers share where the preset is guarded: its counts are for callbacks to read.
    """

    config: BlocksConfig
    guard: Guard | None = None
    sequence_context: SequenceContext | None = None

    def _make_blocks(self, config: BlocksConfig) -> None:
        """At its place among the model's parameters."""
        self.dropout = nn.Dropout(config.dropout)
        self.guard = Guard() if config.preset is not None and preset_of(config.preset).is_guarded else None
        self.blocks = nn.ModuleList([LongNetBlock(config, pattern, self.guard) for pattern in config.patterns])
        self._checked_length = 0

    def _passed(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Embedded tokens (B, N, dim) through all blocks, as wide."""
        if not torch.compiler.is_compiling():
            self._warn_of_reach(x.shape[1])
        hidden_keys = None if attention_mask is None else attention_mask == 0
        x = self.dropout(x)
        with self._saving(x):
            for block in self.blocks:
                x = self._called(block, x, positions, documents, hidden_keys)
        return x

    def _called(self, block: nn.Module, x: Tensor, *told: Tensor | None) -> Tensor:
        if self.config.recompute == "nothing" or not torch.is_grad_enabled():
            out: Tensor = block(x, *told)
            return out
        context: dict[str, Any] = {}
        if self.config.recompute == "all but attention":
            context["context_fn"] = keep_attention
        again: Tensor = checkpoint(block, x, *told, use_reentrant=False, **context)
        return again

    def _saving(self, x: Tensor) -> AbstractContextManager[Any]:
        if not self.config.offload_activations or not torch.is_grad_enabled():
            return nullcontext()
        return partial(save_on_cpu, pin_memory=x.device.type == "cuda")()

    def _warn_of_reach(self, tokens: int) -> None:
        """Once: where tokens of these sequences can never learn of one another, or heads serve no rows."""
        if self.config.attention is not None:
            return  # a class of one's own may see anything
        config, context = self.config, self.sequence_context
        length = tokens if context is None or context.length is None else context.length
        if length <= self._checked_length:
            return
        self._checked_length = length
        found = [pattern.reach(length, config.heads, config.kv_heads) for pattern in dict.fromkeys(config.patterns)]
        if all(reach.has_gaps for reach in found):  # one layer without gaps carries what the others do not
            self._checked_length = sys.maxsize
            warnings.warn("\n".join(map(str, found)), stacklevel=5)
