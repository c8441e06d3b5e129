"""The feed-forward layer of a block: two linear maps with an activation between them."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_longnet.layers.checkpointing import in_chunks
from lightning_longnet.layers.initialization import xavier_parts
from lightning_longnet.layers.linear import projected
from lightning_longnet.layers.options import positive_integer, positive_number, probability

if TYPE_CHECKING:
    from lightning_longnet.sequence.context import SequenceContext

Activation = Literal["gelu", "relu", "silu", "swiglu"]


class FeedForward(nn.Module):
    """Compute `second(sub_norm(dropout(activation(first(x)))))`.

    The dropout on the residual branch belongs to the block.  With "swiglu" the output of the first map is twice as
    wide: the SiLU of its first half multiplies its second half.

    Args:
        embed_dim: width of the input and of the output.
        hidden_dim: width of the hidden values.  The default is 4 times `embed_dim`, and with "swiglu" 8/3 times, which
            gives the same number of parameters.
        activation: "gelu", "relu", "silu" or "swiglu".
        bias: whether both maps have a bias.
        dropout: probability of dropping a hidden value, in training.
        sub_norm: adds a LayerNorm before the second map (MAGNETO).
        norm_eps: epsilon of that LayerNorm.
        gain: gain of the Xavier initialisation of both maps; see `magneto_gain`.
        chunk_tokens: number of tokens that are computed at a time, and recomputed in the backward, so that the hidden
            values of at most this many tokens are in memory.  None computes all at once and recomputes nothing.
    """

    sequence_context: SequenceContext | None = None

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int | None = None,
        *,
        activation: Activation = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        sub_norm: bool = False,
        norm_eps: float = 1e-5,
        gain: float = 1.0,
        chunk_tokens: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in get_args(Activation):
            allowed = ", ".join(map(repr, get_args(Activation)))
            raise ValueError(f"activation must be one of {allowed}, got {activation!r}")
        embed_dim = positive_integer("embed_dim", embed_dim)
        if hidden_dim is None:
            hidden_dim = 8 * ceil(embed_dim / 3) if activation == "swiglu" else 4 * embed_dim
        hidden_dim = positive_integer("hidden_dim", hidden_dim)
        self.chunk_tokens = None if chunk_tokens is None else positive_integer("chunk_tokens", chunk_tokens)
        self.activation, self.dropout = activation, probability("dropout", dropout)
        self.gain = positive_number("gain", gain)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.first = nn.Linear(embed_dim, hidden_dim * (2 if activation == "swiglu" else 1), bias=bias, **factory)
        self.sub_norm = nn.LayerNorm(hidden_dim, norm_eps, **factory) if sub_norm else None
        self.second = nn.Linear(hidden_dim, embed_dim, bias=bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise both maps with Xavier and `gain`, and set the biases to 0."""
        parts = 2 if self.activation == "swiglu" else 1
        xavier_parts(self.first.weight, [self.second.in_features] * parts, [self.gain] * parts)
        nn.init.xavier_normal_(self.second.weight, self.gain)
        for linear in (self.first, self.second):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.sub_norm is not None:
            self.sub_norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., N, embed_dim) to a tensor of the same shape."""
        context = self.sequence_context
        if self.chunk_tokens is not None and context is not None and self.training and self.dropout > 0:
            with context.chunks_as_one():
                return self._forward(x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        context = self.sequence_context
        if self.chunk_tokens is None or x.shape[-2] <= self.chunk_tokens:
            return self._compute(x)
        is_part = None if context is None else context.holds_part(x)  # the shape of a chunk does not show it
        return in_chunks(self._compute, x, self.chunk_tokens, is_part)

    def _compute(self, x: Tensor, is_part: bool | None = None) -> Tensor:
        hidden = projected(self.first, x)
        if self.activation == "swiglu":
            gate, value = hidden.chunk(2, -1)
            hidden = F.silu(gate) * value
        else:
            hidden = getattr(F, self.activation)(hidden)
        context = self.sequence_context
        if context is not None:
            hidden = context.dropout(hidden, self.dropout, self.training, is_part=is_part)
        elif self.training:
            hidden = F.dropout(hidden, self.dropout)
        if self.sub_norm is not None:
            hidden = self.sub_norm(hidden)
        return projected(self.second, hidden)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}, gain={self.gain:.4g}"
