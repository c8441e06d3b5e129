"""The words, the state dict and the results of torch's `nn.MultiheadAttention`, over a pattern."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_longnet.attention.guard import Guard  # noqa: TC001
from lightning_longnet.attention.parallel.schedule import Exchange  # noqa: TC001
from lightning_longnet.attention.pattern.ordering import (
    Ordering,
    check_ordering,
)
from lightning_longnet.attention.pattern.pattern import Pattern
from lightning_longnet.attention.spec import Mix  # noqa: TC001  for typing.get_type_hints
from lightning_longnet.layers.attending import AttentionLayer
from lightning_longnet.layers.masks import ignored_keys, masked_causally
from lightning_longnet.layers.options import (
    pattern_of,
    positive_integer,
    positive_number,
    shown_pattern,
)

DENSE = Pattern.dense()


class MultiheadDilatedAttention(AttentionLayer):
    """`nn.MultiheadAttention` over a pattern: same arguments, same state dict, same results where the pattern is dense.

    It differs in this alone: no weights are returned; a query whose keys are all hidden gets 0 from the attention, not
    NaN; and queries, keys and values stand on one line of tokens.  It stands in `nn.TransformerEncoderLayer` as
    `layer.self_attn`, and is called there in training and in evaluation.

    It is no subclass, as libraries that know `nn.MultiheadAttention` read its weights and pass its forward by.

    Args:
        embed_dim: width of queries and of the output.
        num_heads: heads, which divide `embed_dim`.
        dropout: of the attention's weights, in training.
        bias: of the projections.
        add_bias_kv: refused where True: a key of no token has no place in a pattern.
        add_zero_attn: refused where True, for the same reason.
        kdim: width of keys, `embed_dim` by default.
        vdim: width of values, `embed_dim` by default.
        batch_first: (batch, tokens, width), not (tokens, batch, width).
        pattern: which keys a query sees; a Pattern, or the dictionary of `Pattern.to_dict`.
        sub_norm: a LayerNorm over the joined heads, before the output projection (MAGNETO); it adds to the state dict.
        gain: of the initialisation of v and of the output projection.  With gain 1 and no `sub_norm` the weights begin
            as torch's do, otherwise as MAGNETO's; see `magneto_gain`.
        mix: "exact" or "detached"; see `attend`.
        kernel: "auto", or the name of one; see `explain`.
        exchange: where sequences are split over ranks, how keys reach the queries of others; see `attend`.  None leaves
            it to the strategy.
        ordering: of the line that the pattern is drawn on: the sequence itself ("raster"), or a Hilbert curve over it
            ("hilbert"), see `sequence_hilbert_order`.
        guard: tries kernels before they are used, and says what fails; see `Guard`.

    >>> layer = nn.TransformerEncoderLayer(64, 4, batch_first=True)
    >>> layer.self_attn = MultiheadDilatedAttention(64, 4, batch_first=True, pattern=Pattern.dilated((8, 32), (1, 4)))
    >>> layer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter | None
    k_proj_weight: nn.Parameter | None
    v_proj_weight: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: Pattern | dict[str, Any] = DENSE,
        sub_norm: bool = False,
        gain: float = 1.0,
        mix: Mix = "exact",
        kernel: str = "auto",
        exchange: Exchange | None = None,
        ordering: Ordering = "raster",
        guard: Guard | None = None,
    ) -> None:
        super().__init__(dropout, mix, kernel, exchange, ordering, guard)
        for name, value in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if value:
                raise ValueError(f"{name} must be False, got {value!r}: a key of no token has no place in a pattern")
        self.embed_dim = positive_integer("embed_dim", embed_dim)
        self.num_heads = positive_integer("num_heads", num_heads)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}")
        self.kdim = embed_dim if kdim is None else positive_integer("kdim", kdim)
        self.vdim = embed_dim if vdim is None else positive_integer("vdim", vdim)
        self.head_dim = embed_dim // num_heads
        self.batch_first, self.gain = batch_first, positive_number("gain", gain)
        self.pattern = pattern_of(pattern)
        check_ordering(self.ordering, self.pattern)
        self.causal_pattern = replace(
            self.pattern, branches=tuple(replace(branch, is_causal=True) for branch in self.pattern.branches)
        )
        # What else torch and others read of nn.MultiheadAttention.  False keeps nn.TransformerEncoderLayer, which reads
        # it in evaluation, from computing dense attention with our weights in an operator of its own
        self._qkv_same_embed_dim = False
        self.bias_k = self.bias_v = None
        self.add_zero_attn = False

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        shapes: dict[str, tuple[int, int]] = {"in_proj_weight": (3 * embed_dim, embed_dim)}
        if (self.kdim, self.vdim) != (embed_dim, embed_dim):
            widths = (embed_dim, self.kdim, self.vdim)
            shapes = {name: (embed_dim, width) for name, width in zip(names[1:], widths, strict=True)}
        for name in names:
            weight = nn.Parameter(torch.empty(shapes[name], **made)) if name in shapes else None
            self.register_parameter(name, weight)
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, **made)) if bias else None
        # reset_parameters draws its weights, and torch's order of draws has them drawn once
        where = next(self.parameters())
        self.out_proj = nn.utils.skip_init(
            nn.Linear, embed_dim, embed_dim, bias=bias, device=where.device, dtype=where.dtype
        )
        self.sub_norm = nn.LayerNorm(embed_dim, **made) if sub_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch, bit by bit, or as MAGNETO: xavier with gain 1 for q and k, with `gain` for v and the output."""
        self.out_proj.reset_parameters()
        if self.gain == 1 and self.sub_norm is None:
            for weight in self._weights() if self.in_proj_weight is None else (self.in_proj_weight,):
                nn.init.xavier_uniform_(weight)
        else:
            with torch.no_grad():
                for weight, gain in zip(self._weights(), (1.0, 1.0, self.gain), strict=True):
                    nn.init.xavier_normal_(weight, gain)
            nn.init.xavier_normal_(self.out_proj.weight, self.gain)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        if self.sub_norm is not None:
            self.sub_norm.reset_parameters()

    def _weights(self) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None:
            return self.in_proj_weight.chunk(3)
        assert self.q_proj_weight is not None
        assert self.k_proj_weight is not None
        assert self.v_proj_weight is not None
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool | None = None,
    ) -> tuple[Tensor, None]:
        """(out, None): tensors (N, B, width), (B, N, width) where `batch_first`, or (N, width) for one sequence.

        Args:
            key_padding_mask: (B, N), or (N,) for one sequence; True where a key is ignored, or floats, -inf there and 0
                elsewhere.
            need_weights: refused where True: the N x N weights are what is never held.
            attn_mask: (N, N), hiding nothing, or the causal mask, which means the pattern with every branch causal.
                Which of them it is must be read, and a GPU waited for; `is_causal=True` says it at once.
            average_attn_weights: of weights that are not returned: without effect.
            is_causal: True means the pattern with every branch causal; None and False the pattern as it is, for
                `nn.TransformerEncoderLayer` always says one of them.
        """
        if need_weights:
            raise ValueError("need_weights must be False: the weights of N x N pairs are never held")
        if query.is_nested:
            return self._forward_nested(query, key, value, key_padding_mask, attn_mask, is_causal), None
        length = self._check_tokens(query, key, value)
        pattern = self.causal_pattern if masked_causally(attn_mask, is_causal, length) else self.pattern
        q, k, v = self._projected(query, key, value)
        if query.dim() == 2:
            q, k, v = q[None], k[None], v[None]
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        hidden = None
        if key_padding_mask is not None:
            expected = q.shape[1:2] if query.dim() == 2 else q.shape[:2]
            hidden = self._hidden(key_padding_mask, expected).expand(q.shape[:2])
        out = self._joined(q, k, v, pattern, None, hidden)
        if query.dim() == 2:
            return out.squeeze(0), None
        return out if self.batch_first else out.transpose(0, 1), None

    def _hidden(self, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.sequence_context is None or not self.is_split:
            return ignored_keys(mask, shape)
        # the layers of a model are handed one mask: let them have one shard
        return self.sequence_context.once(mask, "ignored keys", lambda: ignored_keys(mask, shape))

    def _check_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> int:
        if query.dim() not in (2, 3):
            raise ValueError(f"query must be (tokens, width) or have a batch besides, got shape {tuple(query.shape)}")
        widths = (self.embed_dim, self.kdim, self.vdim)
        for name, x, width in zip(("query", "key", "value"), (query, key, value), widths, strict=True):
            if x.shape[-1] != width:
                raise ValueError(f"{name} must be {width} wide, got shape {tuple(x.shape)}")
            if x.shape[:-1] != query.shape[:-1]:
                raise ValueError(
                    f"{name} must have the tokens and the batch of query, {tuple(query.shape[:-1])}, got "
                    f"{tuple(x.shape[:-1])}: a pattern is drawn on one line of tokens, and serves no cross attention"
                )
        return query.shape[1 if query.dim() == 3 and self.batch_first else 0]

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (..., heads, head_dim), in the order of the dimensions given."""
        heads = (self.num_heads, self.head_dim)
        if self.in_proj_weight is not None and query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, *heads)).unbind(-3)
            return q, k, v
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, heads)
            for x, weight, bias in zip((query, key, value), self._weights(), biases, strict=True)
        )
        return q, k, v

    def _joined(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, documents: Tensor | None, hidden: Tensor | None
    ) -> Tensor:
        out = self._attended(q, k, v, pattern, documents, hidden).flatten(2)
        if self.sub_norm is not None:
            out = self.sub_norm(out)
        projected: Tensor = self.out_proj(out)
        return projected

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool | None,
    ) -> Tensor:
        """What nn.TransformerEncoder makes of a padded batch in evaluation: its sequences, here as packed documents."""
        if query is not key or key is not value or query.layout != torch.strided:
            raise ValueError(
                f"a nested query must be key and value as well, and strided, got the layout {query.layout}: pack the "
                f"sequences into a row and attend with documents"
            )
        if self.is_split:
            raise ValueError("query must be no nested tensor where sequences are split over ranks: hand in padding")
        if key_padding_mask is not None or attn_mask is not None:
            raise ValueError("key_padding_mask and attn_mask must be None beside nested tensors, which hold no padding")
        parts = query.unbind()
        lengths = [len(part) for part in parts]
        documents = torch.arange(len(parts)).repeat_interleave(torch.tensor(lengths)).to(query.device)
        row = torch.cat(parts)[None]
        q, k, v = self._projected(row, row, row)
        pattern = self.causal_pattern if is_causal else self.pattern
        out = self._joined(q, k, v, pattern, documents, None)
        return torch.nested.as_nested_tensor(list(out[0].split(lengths)))

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, {self.num_heads}, {shown_pattern(self.pattern)}, kdim={self.kdim}, vdim={self.vdim}, "
            f"dropout={self.dropout}, batch_first={self.batch_first}, gain={self.gain:.4g}, mix={self.mix!r}"
        )
