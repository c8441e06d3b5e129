"""The transformer blocks that all models share, their configuration, and the base class that runs them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_longnet.attention.guard import Guard
from lightning_longnet.attention.parallel.schedule import Exchange  # noqa: TC001
from lightning_longnet.attention.pattern.lines import check_ordering
from lightning_longnet.attention.pattern.ordering import Ordering  # noqa: TC001
from lightning_longnet.attention.pattern.pattern import Pattern, check_heads
from lightning_longnet.attention.spec import Mix  # noqa: TC001  for the command line's reading of types
from lightning_longnet.layers import DilatedSelfAttention, FeedForward, keep_attention, magneto_gain
from lightning_longnet.layers.checkpointing import keep_attention_on_host
from lightning_longnet.layers.feed_forward import Activation  # noqa: TC001
from lightning_longnet.layers.offloading import saved_on_host
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
    from lightning_longnet.inference.step import LayerStep, Step
    from lightning_longnet.sequence.context import SequenceContext

Recompute = Literal["nothing", "all but attention", "everything"]


@dataclass(frozen=True)
class BlocksConfig:
    """The configuration of a model's blocks, in plain values that a YAML file can hold.

    Args:
        pattern: the keys that each token attends to; one pattern for all layers, or a list with one for each layer.
        dim: width of the model.
        layers: number of blocks.
        heads: number of query heads in each block.
        kv_heads: number of key and value heads; divides `heads`, and equals it by default.
        hidden_dim: width of the hidden values of the feed-forward; see `FeedForward`.
        activation: activation of the feed-forward: "gelu", "relu", "silu" or "swiglu".
        rotary: rotary position embedding: "rope", "xpos" or None.
        rope_base: base of the wavelengths of the rotation.
        xpos_scale_base: `scale_base` of xPos; see `RotaryPositions`.
        qk_norm: adds an RMSNorm over each head of q and of k.
        sub_norm: adds LayerNorms inside the blocks, and initialises with `magneto_gain` (MAGNETO).
        norm_eps: epsilon of every LayerNorm.
        bias: whether the linear maps in the blocks have a bias.
        dropout: dropout probability of the embeddings, of the output of both halves of a block, and of the hidden
            values of the feed-forward.
        attention_dropout: probability of dropping an attention weight.
        recompute: activations of a block that are recomputed in the backward instead of saved: "nothing", "all but
            attention" or "everything".
        offload_activations: keeps the tensors that are saved for the backward in the memory of the host.
        feed_forward_chunk: number of tokens that the feed-forward computes at a time; all by default.
        mix: "exact" or "detached"; see `attend`.
        kernel: "auto", or the name of a kernel; see `explain`.
        exchange: how keys reach the queries of other ranks where sequences are split; see `attend`.  None leaves the
            choice to the strategy.
        ordering: the order of tokens that the pattern of every layer applies to: "raster", the order of the sequence,
            or "hilbert", a Hilbert curve over the sequence; see `sequence_hilbert_order`.
        preset: a name from `available_presets()`.  It sets exchange, ordering and guard, and "block_sparse" keeps
            blocks of a pattern without block sparsity.  Values given beside it must agree with it.
        attention: the class of the attention layers, {"class_path": "package.Name", "init_args": {...}}.  It is built
            from (dim, heads, pattern, **init_args), and called as `DilatedSelfAttention`, the default, is.  The other
            arguments of attention apply to the default alone.
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
            self._apply_preset(preset_of(self.preset))
        for pattern in self.patterns:
            check_ordering(self.layer_ordering, pattern)

    def _apply_preset(self, preset: Preset) -> None:
        """Set the fields that the preset has a value for; refuse a field that was given another value."""
        for name, value, unset in (("exchange", preset.exchange, None), ("ordering", preset.ordering, "raster")):
            given = getattr(self, name)
            if value is None:
                continue
            if given not in (unset, value):
                raise ValueError(f"{name} must be {value!r} with preset={preset.name!r}, got {given!r}")
            object.__setattr__(self, name, value)
        if self.attention is not None:
            raise ValueError(f"attention must be None with preset={preset.name!r}: a preset is of our own layers")
        patterns = tuple(preset.pattern_of(each) for each in self.patterns)
        object.__setattr__(self, "pattern", patterns if isinstance(self.pattern, tuple) else patterns[0])

    @property
    def layer_ordering(self) -> Ordering:
        """The ordering of the attention layers; LongViT, which orders its patches itself, overrides it."""
        return self.ordering

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The pattern of each layer."""
        return self.pattern if isinstance(self.pattern, tuple) else (self.pattern,) * self.layers  # type: ignore[return-value]

    @property
    def is_causal(self) -> bool:
        """Whether the patterns of all layers are causal."""
        return all(pattern.is_causal for pattern in self.patterns)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values; `LongNetConfig(**values)` makes an equal configuration of them."""
        values = asdict(self)
        shown = [pattern.to_dict() for pattern in self.patterns]
        values["pattern"] = shown if isinstance(self.pattern, tuple) else shown[0]
        return values


def epsilon(name: str, value: float | str) -> float:
    """Return `value` as a positive float.  Text is converted, because YAML 1.1 reads 1e-05 as text."""
    try:
        return positive_number(name, float(value) if isinstance(value, str) else value)
    except ValueError:
        raise ValueError(f"{name} must be a positive, finite number, got {value!r}") from None


class LongNetBlock(nn.Module):
    """A pre-norm transformer block: attention and feed-forward, each after a LayerNorm and inside a residual.

    Args:
        config: the configuration of the model.
        pattern: the pattern of this layer.
        guard: the guard that the layers of the model share, or None.

    Attributes:
        checkpointing: the function that calls the block under activation checkpointing while the model trains, instead
            of what `config.recompute` asks for; None has none.  transformers sets it.
    """

    checkpointing: Callable[..., Tensor] | None = None

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
        self,
        x: Tensor,
        positions: Tensor | None,
        documents: Tensor | None,
        key_padding_mask: Tensor | None,
        cached: LayerStep | None = None,
    ) -> Tensor:
        """Map x (B, N, dim) to a tensor of the same shape; the other arguments are those of `DilatedSelfAttention`."""
        options: dict[str, Any] = {
            "positions": positions,
            "documents": documents,
            "key_padding_mask": key_padding_mask,
        }
        if cached is not None:  # a custom class of attention has no such argument
            return self._continued(x, cached)
        x = x + self.dropout(self.attention(self.attention_norm(x), **options))
        out: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return out

    def _continued(self, x: Tensor, cached: LayerStep) -> Tensor:
        """Map further tokens of texts; a call of dropout that does nothing would cost a token as much as its norm."""
        attended, drops = self.attention(self.attention_norm(x), cached=cached), self.dropout.training
        x = x + (self.dropout(attended) if drops else attended)
        mapped = self.feed_forward(self.feed_forward_norm(x))
        out: Tensor = x + (self.dropout(mapped) if drops else mapped)
        return out


def _attention(config: BlocksConfig, pattern: Pattern, shared: dict[str, Any], guard: Guard | None) -> nn.Module:
    """Return a new attention layer; `shared` holds the arguments that attention and feed-forward have in common."""
    if config.attention is not None:
        layer: nn.Module = class_of(config.attention)(
            config.dim, config.heads, pattern, **config.attention.get("init_args", {})
        )
        return layer
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
    """The base class of the models: it holds the blocks, runs them, and recomputes or offloads their activations.

    A model adds the embedding, the last norm and the head.

    Attributes:
        config: the configuration.
        guard: the `Guard` that the layers share where the preset is guarded; callbacks read its counts.
        sequence_context: the context that a strategy, or `attach_context`, sets where sequences are split over ranks.
    """

    config: BlocksConfig
    guard: Guard | None = None
    sequence_context: SequenceContext | None = None

    def _make_blocks(self, config: BlocksConfig) -> None:
        """Create the blocks.

        The model calls this between its embedding and its head: the order of its parameters is that of creation.
        """
        self.dropout = nn.Dropout(config.dropout)
        self.guard = Guard() if config.preset is not None and preset_of(config.preset).is_guarded else None
        self.blocks = nn.ModuleList([LongNetBlock(config, pattern, self.guard) for pattern in config.patterns])
        self._checked_length = 0

    def _run_blocks(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        attention_mask: Tensor | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """Run embedded tokens x (B, N, dim) through all blocks.

        attention_mask (B, N) is 0 where a token is padding.  To the list `states` the input of each block is appended,
        and the output of the last.
        """
        if not torch.compiler.is_compiling():
            self._warn_of_reach(x.shape[1])
        hidden_keys = None if attention_mask is None else attention_mask == 0
        x = self.dropout(x)
        with self._offload():
            for block in self.blocks:
                if states is not None:
                    states.append(x)
                x = self._call_block(block, x, positions, documents, hidden_keys)
        if states is not None:
            states.append(x)
        return x

    def _run_cached_blocks(self, x: Tensor, step: Step, states: list[Tensor] | None = None) -> Tensor:
        """Run the tokens x (B, n, dim) of a step through all blocks, with the keys that a cache holds."""
        for number, block in enumerate(self.blocks):
            if states is not None:
                states.append(x)
            x = block(x, None, None, None, step.layer(number))
        if states is not None:
            states.append(x)
        return x

    def _call_block(self, block: nn.Module, x: Tensor, *arguments: Tensor | None) -> Tensor:
        """Call a block, under activation checkpointing where the block or `config.recompute` asks for it."""
        checkpointing: Callable[..., Tensor] | None = getattr(block, "checkpointing", None)  # a wrapper may lack it
        if checkpointing is not None and self.training and torch.is_grad_enabled():
            return checkpointing(block, x, *arguments)
        if self.config.recompute == "nothing" or not torch.is_grad_enabled():
            out: Tensor = block(x, *arguments)
            return out
        context: dict[str, Any] = {}
        if self.config.recompute == "all but attention":
            context["context_fn"] = keep_attention_on_host if self.config.offload_activations else keep_attention
        recomputed: Tensor = checkpoint(block, x, *arguments, use_reentrant=False, **context)
        return recomputed

    def _offload(self) -> AbstractContextManager[Any]:
        """Return the context in which tensors saved for the backward move to the host, where they are offloaded."""
        if not self.config.offload_activations or not torch.is_grad_enabled():
            return nullcontext()
        return saved_on_host()

    def _warn_of_reach(self, tokens: int) -> None:
        """Warn once where the patterns leave gaps at this length.

        Gaps are pairs of tokens that no number of layers connects, or heads that serve no rows; see `Pattern.reach`.
        Shorter sequences than the longest that was checked are not checked again.
        """
        if self.config.attention is not None:
            return  # the keys that a custom class attends to are not known
        config, context = self.config, self.sequence_context
        length = tokens if context is None or context.length is None else context.length
        if length <= self._checked_length:
            return
        self._checked_length = length
        reaches = [pattern.reach(length, config.heads, config.kv_heads) for pattern in dict.fromkeys(config.patterns)]
        if all(reach.has_gaps for reach in reaches):  # one layer without gaps carries what the others do not
            self._checked_length = sys.maxsize
            warnings.warn("\n".join(map(str, reaches)), stacklevel=5)
