"""A replacement of torch's `nn.MultiheadAttention` that attends over a pattern."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_longnet.attention.guard import Guard  # noqa: TC001
from lightning_longnet.attention.parallel.schedule import Exchange  # noqa: TC001
from lightning_longnet.attention.pattern.lines import check_ordering
from lightning_longnet.attention.pattern.ordering import Ordering  # noqa: TC001
from lightning_longnet.attention.pattern.pattern import Pattern
from lightning_longnet.attention.spec import Mix  # noqa: TC001  for typing.get_type_hints
from lightning_longnet.layers.attending import AttentionLayer
from lightning_longnet.layers.linear import product, projected
from lightning_longnet.layers.masks import ignored_keys, masked_causally
from lightning_longnet.layers.options import (
    pattern_of,
    positive_integer,
    positive_number,
    shown_pattern,
)
from lightning_longnet.layers.signatures import LAYER, refuse_former

DENSE = Pattern.dense()


class MultiheadDilatedAttention(AttentionLayer):
    """`nn.MultiheadAttention` over a pattern: same arguments, same state dict, same results where the pattern is dense.

    There are three differences: it returns no attention weights; a query whose keys are all masked gets 0 from the
    attention, not NaN; and queries, keys and values must have the same tokens, so there is no cross attention.  It can
    replace `layer.self_attn` of an `nn.TransformerEncoderLayer`, which calls it in training and in evaluation.

    It does not derive from `nn.MultiheadAttention`, because libraries that know that class read its weights and skip
    its forward.

    Args:
        embed_dim: width of queries and of the output.
        num_heads: number of heads; divides `embed_dim`.
        dropout: probability of dropping an attention weight, in training.
        bias: whether the projections have a bias.
        add_bias_kv: must be False: a key that belongs to no token has no position in a pattern.
        add_zero_attn: must be False, for the same reason.
        kdim: width of keys, `embed_dim` by default.
        vdim: width of values, `embed_dim` by default.
        batch_first: True for tensors (B, N, width), False for (N, B, width).
        pattern: the keys that each query attends to, as a Pattern or the dictionary of `Pattern.to_dict`.
        sub_norm: adds a LayerNorm over the concatenated heads, before the output projection (MAGNETO), and its weights
            to the state dict.
        gain: gain of the Xavier initialisation of v and of the output projection.  With a gain of 1 and no `sub_norm`
            the initialisation is torch's, otherwise that of MAGNETO; see `magneto_gain`.
        mix: "exact" or "detached"; see `attend`.
        kernel: "auto", or the name of a kernel; see `explain`.
        exchange: how keys reach the queries of other ranks where sequences are split; see `attend`.  None leaves the
            choice to the strategy.
        ordering: the order of tokens that the pattern applies to: "raster", the order of the sequence, or "hilbert", a
            Hilbert curve over the sequence; see `sequence_hilbert_order`.
        guard: a `Guard`, which tries kernels before they are used and reports which one fails; None has none.

    >>> layer = nn.TransformerEncoderLayer(64, 4, batch_first=True)
    >>> layer.self_attn = MultiheadDilatedAttention(64, 4, batch_first=True, pattern=Pattern.dilated((8, 32), (1, 4)))
    >>> layer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter | None
    k_proj_weight: nn.Parameter | None
    v_proj_weight: nn.Parameter | None

    @refuse_former(LAYER, "MultiheadDilatedAttention")
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
        # attributes of nn.MultiheadAttention that torch and other libraries read.  nn.TransformerEncoderLayer reads
        # _qkv_same_embed_dim in evaluation: True would let it compute dense attention with these weights in its fused
        # operator, and not call forward
        self._qkv_same_embed_dim = False
        self.bias_k = self.bias_v = None
        self.add_zero_attn = False

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        shapes: dict[str, tuple[int, int]] = {"in_proj_weight": (3 * embed_dim, embed_dim)}
        if (self.kdim, self.vdim) != (embed_dim, embed_dim):
            widths = (embed_dim, self.kdim, self.vdim)
            shapes = {name: (embed_dim, width) for name, width in zip(names[1:], widths, strict=True)}
        for name in names:
            weight = nn.Parameter(torch.empty(shapes[name], **factory)) if name in shapes else None
            self.register_parameter(name, weight)
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, **factory)) if bias else None
        # reset_parameters samples its weights; sampling them here too would leave another random state than torch's
        first = next(self.parameters())
        self.out_proj = nn.utils.skip_init(
            nn.Linear, embed_dim, embed_dim, bias=bias, device=first.device, dtype=first.dtype
        )
        self.sub_norm = nn.LayerNorm(embed_dim, **factory) if sub_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights as `nn.MultiheadAttention` does, bit by bit, where `gain` is 1 without `sub_norm`.

        Otherwise initialise them as MAGNETO does: Xavier with gain 1 for q and k, and with `gain` for v and the output.
        """
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
        """Return the weights of the projections of q, k and v, as views where they are fused."""
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
        """Return (out, None), where out has the shape of `query`.

        Args:
            query: (N, B, embed_dim), (B, N, embed_dim) with `batch_first`, or (N, embed_dim) for one sequence.
            key: as `query`, `kdim` wide.
            value: as `query`, `vdim` wide.
            key_padding_mask: (B, N), or (N,) for one sequence: bools, True where a key is ignored, or floats, -inf
                there and 0 elsewhere.
            need_weights: must be False: the N x N weights are never in memory.
            attn_mask: (N, N), either a mask that excludes nothing, or the causal mask, which makes every branch of the
                pattern causal.  Telling the two requires its values, and so waits for a GPU; `is_causal=True` does not.
            average_attn_weights: has no effect, as no weights are returned.
            is_causal: True makes every branch of the pattern causal; None and False take the pattern as it is, as
                `nn.TransformerEncoderLayer` always passes one of the two.
        """
        if need_weights:
            raise ValueError("need_weights must be False: the weights of N x N pairs are never held")
        if query.is_nested:
            return self._forward_nested(query, key, value, key_padding_mask, attn_mask, is_causal), None
        length = self._check_tokens(query, key, value)
        pattern = self.causal_pattern if masked_causally(attn_mask, is_causal, length) else self.pattern
        q, k, v = self._project(query, key, value)
        if query.dim() == 2:
            q, k, v = q[None], k[None], v[None]
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        hidden = None
        if key_padding_mask is not None:
            expected = q.shape[1:2] if query.dim() == 2 else q.shape[:2]
            hidden = self._hidden(key_padding_mask, expected).expand(q.shape[:2])
        out = self._attend_and_project(q, k, v, pattern, None, hidden)
        if query.dim() == 2:
            return out.squeeze(0), None
        return out if self.batch_first else out.transpose(0, 1), None

    def _hidden(self, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return key_padding_mask as bools of this shape."""
        if self.sequence_context is None or not self.is_split:
            return ignored_keys(mask, shape)
        # all layers of a model get the same mask; converting it once gives them the same tensor, and so one shard
        hidden: Tensor = self.sequence_context.once(mask, "ignored keys", lambda: ignored_keys(mask, shape))
        return hidden

    def _check_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> int:
        """Check the shapes of query, key and value, and return the number of tokens N."""
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

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the projections q, k and v, each (..., num_heads, head_dim) with the leading dimensions of `query`."""
        heads = (self.num_heads, self.head_dim)
        if self.in_proj_weight is not None and query is key and key is value:
            q, k, v = product(query, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, *heads)).unbind(-3)
            return q, k, v
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            product(x, weight, bias).unflatten(-1, heads)
            for x, weight, bias in zip((query, key, value), self._weights(), biases, strict=True)
        )
        return q, k, v

    def _attend_and_project(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, documents: Tensor | None, hidden: Tensor | None
    ) -> Tensor:
        """Attend, concatenate the heads and project them: (B, N, num_heads, head_dim) to (B, N, embed_dim)."""
        out = self._attended(q, k, v, pattern, documents, hidden).flatten(2)
        if self.sub_norm is not None:
            out = self.sub_norm(out)
        return projected(self.out_proj, out)

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool | None,
    ) -> Tensor:
        """Return the output for a nested tensor, whose sequences are packed into one row and attended to as documents.

        `nn.TransformerEncoder` converts a padded batch to a nested tensor in evaluation.
        """
        if query is not key or key is not value or query.layout != torch.strided:
            raise ValueError(
                f"a nested query must be key and value as well, and strided, got the layout {query.layout}: pack the "
                f"sequences into a row and attend with documents"
            )
        if self.is_split:
            raise ValueError("query must be no nested tensor if sequences are split over ranks: pass a padded tensor")
        if key_padding_mask is not None or attn_mask is not None:
            raise ValueError("key_padding_mask and attn_mask must be None beside nested tensors, which hold no padding")
        parts = query.unbind()
        lengths = [len(part) for part in parts]
        documents = torch.arange(len(parts)).repeat_interleave(torch.tensor(lengths)).to(query.device)
        row = torch.cat(parts)[None]
        q, k, v = self._project(row, row, row)
        pattern = self.causal_pattern if is_causal else self.pattern
        out = self._attend_and_project(q, k, v, pattern, documents, None)
        return torch.nested.as_nested_tensor(list(out[0].split(lengths)))

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, {self.num_heads}, {shown_pattern(self.pattern)}, kdim={self.kdim}, vdim={self.vdim}, "
            f"dropout={self.dropout}, batch_first={self.batch_first}, gain={self.gain:.4g}, mix={self.mix!r}"
        )
