"""LongNet: a transformer whose attention is a pattern, as a decoder or, where the pattern is not causal, an encoder."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from lightning_longnet.attention.attend import Mix  # noqa: TC001  for the command line's reading of types
from lightning_longnet.attention.pattern import Pattern, check_heads
from lightning_longnet.attention.schedule import Exchange  # noqa: TC001
from lightning_longnet.layers import DilatedSelfAttention, FeedForward, keep_attention, magneto_gain
from lightning_longnet.layers.arguments import pattern_of, positive_integer, probability
from lightning_longnet.layers.feed_forward import Activation  # noqa: TC001
from lightning_longnet.layers.positions import Kind  # noqa: TC001
from lightning_longnet.loss import CHUNK_TOKENS, TokenLoss, chunked_cross_entropy

Recompute = Literal["nothing", "all but attention", "everything"]


@dataclass(frozen=True)
class LongNetConfig:
    """The shape of a model, in plain values that a YAML file can hold.

    Args:
        pattern: what a token sees; one for all layers, or one for each.
        vocab_size: tokens that are told apart.
        dim: width of the model.
        layers: how many blocks.
        heads: query heads in each.
        kv_heads: key and value heads, which divide `heads`; as many by default.
        hidden_dim: width inside the feed-forward; see `FeedForward`.
        activation: of the feed-forward: "gelu", "relu", "silu" or "swiglu".
        rotary: "rope", "xpos" or None.
        rope_base: of the wavelengths.
        qk_norm: an RMSNorm over each head of q and of k.
        sub_norm: MAGNETO: LayerNorms inside the blocks, and a gain of the initialisation that goes with them.
        bias: of the linear maps in the blocks.
        dropout: of the embeddings, of what each half of a block adds, and of the feed-forward's hidden values.
        attention_dropout: of the attention's weights.
        tied_embeddings: the head's weight is that of the embedding.
        recompute: what of a block is computed again in the backward rather than held: "nothing", "all but attention" or
            "everything".
        offload_activations: what the backward needs waits for it in the host's memory.
        feed_forward_chunk: tokens that the feed-forward computes at a time; all by default.
        loss_chunk: tokens whose logits the loss holds at a time.
        mix: "exact" or "detached"; see `attend`.
        kernel: "auto", or the name of one; see `explain`.
        exchange: where sequences are split over ranks; None leaves it to the strategy.
    """

    pattern: Pattern | Sequence[Pattern]
    vocab_size: int = 256
    dim: int = 768
    layers: int = 12
    heads: int = 12
    kv_heads: int | None = None
    hidden_dim: int | None = None
    activation: Activation = "gelu"
    rotary: Kind | None = "rope"
    rope_base: float = 10000.0
    qk_norm: bool = False
    sub_norm: bool = True
    bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    tied_embeddings: bool = True
    recompute: Recompute = "nothing"
    offload_activations: bool = False
    feed_forward_chunk: int | None = None
    loss_chunk: int = CHUNK_TOKENS
    mix: Mix = "exact"
    kernel: str = "auto"
    exchange: Exchange | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads", "loss_chunk"):
            positive_integer(name, getattr(self, name))
        check_heads(self.heads, self.kv_heads)
        probability("dropout", self.dropout)
        if self.recompute not in get_args(Recompute):
            allowed = ", ".join(map(repr, get_args(Recompute)))
            raise ValueError(f"recompute must be one of {allowed}, got {self.recompute!r}")
        given = self.pattern
        is_list = isinstance(given, Sequence) and not isinstance(given, str)
        patterns = tuple(map(pattern_of, given)) if is_list else pattern_of(given)  # type: ignore[arg-type]
        if isinstance(patterns, tuple) and len(patterns) != self.layers:
            raise ValueError(f"pattern must be one, or one for each of the {self.layers} layers, got {len(patterns)}")
        object.__setattr__(self, "pattern", patterns)

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """One for each layer."""
        return self.pattern if isinstance(self.pattern, tuple) else (self.pattern,) * self.layers  # type: ignore[return-value]

    @property
    def is_causal(self) -> bool:
        return all(pattern.is_causal for pattern in self.patterns)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, of which `LongNetConfig(**values)` is this one again."""
        found = asdict(self)
        shown = [pattern.to_dict() for pattern in self.patterns]
        found["pattern"] = shown if isinstance(self.pattern, tuple) else shown[0]
        return found


class LongNetBlock(nn.Module):
    """Attention and feed-forward, each after a LayerNorm and beside a path that changes nothing."""

    def __init__(self, config: LongNetConfig, pattern: Pattern) -> None:
        super().__init__()
        gain = magneto_gain(config.layers) if config.sub_norm else 1.0
        shared: dict[str, Any] = {"bias": config.bias, "sub_norm": config.sub_norm, "gain": gain}
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = DilatedSelfAttention(
            config.dim,
            config.heads,
            pattern,
            num_kv_heads=config.kv_heads,
            dropout=config.attention_dropout,
            rotary=config.rotary,
            rope_base=config.rope_base,
            qk_norm=config.qk_norm,
            mix=config.mix,
            kernel=config.kernel,
            exchange=config.exchange,
            **shared,
        )
        self.feed_forward_norm = nn.LayerNorm(config.dim)
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


class LongNet(nn.Module):
    """Tokens to logits, or to the loss of their labels without ever holding all logits.

    >>> pattern = Pattern.dilated((64, 256), (1, 4), is_causal=True)
    >>> model = LongNet(LongNetConfig(pattern, dim=32, layers=2, heads=4))
    >>> tokens = torch.randint(256, (1, 500))
    >>> model(tokens).shape
    torch.Size([1, 500, 256])
    >>> loss_sum, token_count = model(tokens[:, :-1], tokens[:, 1:])
    """

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([LongNetBlock(config, pattern) for pattern in config.patterns])
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        self._checked_length = 0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Of the embedding and the head; the layers begin by themselves."""
        nn.init.normal_(self.embedding.weight, std=self.config.dim**-0.5)
        if not self.config.tied_embeddings:
            nn.init.normal_(self.head.weight, std=self.config.dim**-0.5)

    @overload
    def forward(
        self,
        input_ids: Tensor,
        labels: None = None,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> TokenLoss: ...

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | TokenLoss:
        """Logits (B, N, vocabulary), or, with labels, the sum of their losses and how many count.

        Args:
            input_ids: (B, N); this rank's part where sequences are split.
            labels: (B, N): of each token the one that it is to predict, or -100.
            positions: (N,) or (B, N), for the rotation; places in the document by default.
            documents: an id per token, not decreasing: each document is attended to alone.
            attention_mask: (B, N), 0 where a token is padding.
        """
        hidden = self.encode(
            self.embedding(input_ids), positions=positions, documents=documents, attention_mask=attention_mask
        )
        if labels is None:
            logits: Tensor = self.head(hidden)
            return logits
        return chunked_cross_entropy(hidden, self.head.weight, labels, chunk_tokens=self.config.loss_chunk)

    def encode(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Embedded tokens (B, N, dim) to what the head reads, as wide."""
        if not torch.compiler.is_compiling():
            self._warn_of_reach(x.shape[1])
        hidden_keys = None if attention_mask is None else attention_mask == 0
        x = self.dropout(x)
        with self._saving(x):
            for block in self.blocks:
                x = self._called(block, x, positions, documents, hidden_keys)
        out: Tensor = self.norm(x)
        return out

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
        config, layer = self.config, self.blocks[0].attention
        assert isinstance(layer, DilatedSelfAttention)
        context = layer.sequence_context
        length = tokens if context is None or context.length is None else context.length
        if length <= self._checked_length:
            return
        self._checked_length = length
        found = [pattern.reach(length, config.heads, config.kv_heads) for pattern in dict.fromkeys(config.patterns)]
        if all(reach.has_gaps for reach in found):  # one layer without gaps carries what the others do not
            self._checked_length = sys.maxsize
            warnings.warn("\n".join(map(str, found)), stacklevel=4)
