"""Self-attention with one fused projection of q, k and v, and rotary positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_longnet.attention.guard import Guard  # noqa: TC001
from lightning_longnet.attention.parallel.schedule import Exchange  # noqa: TC001
from lightning_longnet.attention.pattern.lines import check_ordering
from lightning_longnet.attention.pattern.ordering import Ordering  # noqa: TC001
from lightning_longnet.attention.pattern.pattern import Pattern, check_heads
from lightning_longnet.attention.spec import Mix  # noqa: TC001  for typing.get_type_hints
from lightning_longnet.layers.attending import AttentionLayer, places_of
from lightning_longnet.layers.initialization import xavier_parts
from lightning_longnet.layers.linear import projected
from lightning_longnet.layers.options import (
    pattern_of,
    positive_integer,
    positive_number,
    shown_pattern,
)
from lightning_longnet.layers.positions import Kind, RotaryPositions

if TYPE_CHECKING:
    from lightning_longnet.inference.step import LayerStep

# Where no gradients are needed, q and k of more tokens are rotated in place, so many at a time
ROTATED_TOKENS = 2**14


class HeadNorm(nn.RMSNorm):
    """RMSNorm over each head that returns the dtype of its input.

    Under autocast the input is bfloat16 and the weight is float32; the result would be float32 otherwise.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(x.dtype)


class DilatedSelfAttention(AttentionLayer):
    """Project to queries, keys and values, rotate them by their positions, `attend`, and project the result.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: number of query heads.
        pattern: the keys that each query attends to, as a Pattern or the dictionary of `Pattern.to_dict`.
        num_kv_heads: number of key and value heads; divides `num_heads`, and equals it by default.
        head_dim: width of a head; `embed_dim / num_heads` by default.
        bias: whether both projections have a bias.
        dropout: probability of dropping an attention weight, in training.
        rotary: "rope", "xpos" or None; see `RotaryPositions`.
        rope_base: base of the wavelengths of the rotation.
        xpos_scale_base: `scale_base` of xPos.
        qk_norm: adds an RMSNorm over each head of q and of k, before the rotation.
        sub_norm: adds a LayerNorm over the concatenated heads, before the output projection (MAGNETO).
        norm_eps: epsilon of that LayerNorm.
        gain: gain of the Xavier initialisation of v and of the output projection; see `magneto_gain`.
        mix: "exact" or "detached"; see `attend`.
        kernel: "auto", or the name of a kernel; see `explain`.
        exchange: how keys reach the queries of other ranks where sequences are split; see `attend`.  None leaves the
            choice to the strategy.
        ordering: the order of tokens that the pattern applies to: "raster", the order of the sequence, or "hilbert", a
            Hilbert curve over the sequence; see `sequence_hilbert_order`.
        guard: a `Guard`, which tries kernels before they are used and reports which one fails; None has none.

    >>> layer = DilatedSelfAttention(64, 4, Pattern.dilated((128, 512), (1, 4), is_causal=True), num_kv_heads=2)
    >>> layer(torch.randn(1, 1000, 64)).shape
    torch.Size([1, 1000, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pattern: Pattern | dict[str, Any],
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        rotary: Kind | None = "rope",
        rope_base: float = 10000.0,
        xpos_scale_base: float = 512.0,
        qk_norm: bool = False,
        sub_norm: bool = False,
        norm_eps: float = 1e-5,
        gain: float = 1.0,
        mix: Mix = "exact",
        kernel: str = "auto",
        exchange: Exchange | None = None,
        ordering: Ordering = "raster",
        guard: Guard | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dropout, mix, kernel, exchange, ordering, guard)
        self.embed_dim = positive_integer("embed_dim", embed_dim)
        self.num_heads = positive_integer("num_heads", num_heads)
        self.num_kv_heads = check_heads(num_heads, num_kv_heads)
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be divisible by num_heads where head_dim is None, got {embed_dim} and {num_heads}"
            )
        self.head_dim = embed_dim // num_heads if head_dim is None else positive_integer("head_dim", head_dim)
        self.pattern = pattern_of(pattern)
        check_ordering(self.ordering, self.pattern)
        self.gain = positive_number("gain", gain)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv_proj = nn.Linear(embed_dim, sum(self._rows()), bias=bias, **factory)
        self.q_norm = HeadNorm(self.head_dim, eps=1e-6, **factory) if qk_norm else None
        self.k_norm = HeadNorm(self.head_dim, eps=1e-6, **factory) if qk_norm else None
        self.rotary = None
        if rotary is not None:
            self.rotary = RotaryPositions(
                self.head_dim, base=rope_base, kind=rotary, scale_base=xpos_scale_base, pattern=self.pattern
            )
        width = self.num_heads * self.head_dim
        self.sub_norm = nn.LayerNorm(width, norm_eps, **factory) if sub_norm else None
        self.out_proj = nn.Linear(width, embed_dim, bias=bias, **factory)
        self.reset_parameters()

    def _rows(self) -> tuple[int, int, int]:
        """Return how many rows of the fused weight belong to q, to k and to v."""
        kv_rows = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, kv_rows, kv_rows

    def reset_parameters(self) -> None:
        """Initialise the weights: Xavier with gain 1 for q and k, and with `gain` for v and the output projection."""
        xavier_parts(self.qkv_proj.weight, self._rows(), (1.0, 1.0, self.gain))
        nn.init.xavier_normal_(self.out_proj.weight, self.gain)
        for linear in (self.qkv_proj, self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for norm in (self.q_norm, self.k_norm, self.sub_norm):
            if norm is not None:
                norm.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cached: LayerStep | None = None,
    ) -> Tensor:
        """Return the attention output (B, N, embed_dim).

        Where sequences are split over ranks, N counts the tokens of this rank.

        Args:
            x: (B, N, embed_dim).
            positions: integers (N,) or (B, N) for the rotation; the index of each token in its document by default.
                The pattern does not read them: its segments count the tokens of a document in their order.
            documents: integers (N,) or (B, N), the id of each token's document, not decreasing.  A token attends only
                within its document.
            key_padding_mask: bools (B, N), True where a key is ignored.  A query that sees no key gets 0 from the
                attention.
            cached: the step of this layer in a `DilatedCache`, whose tokens x holds.  It has their positions and
                documents, and the keys of the tokens before them.
        """
        if x.dim() != 3 or x.shape[2] != self.embed_dim:
            raise ValueError(f"x must be (batch, tokens, {self.embed_dim}), got shape {tuple(x.shape)}")
        return self._projected(self._attention(x, positions, documents, key_padding_mask, cached))

    def _attention(
        self,
        x: Tensor,
        positions: Tensor | None,
        documents: Tensor | None,
        key_padding_mask: Tensor | None,
        cached: LayerStep | None,
    ) -> Tensor:
        """Return the output of attention (B, N, H, D); q, k and v are not held any more when it is projected."""
        q, k, v = (
            projected(self.qkv_proj, x)
            .unflatten(-1, (-1, self.head_dim))
            .split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=2)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cached is not None:
            if self.rotary is not None:
                q, k = cached.rotated(self.rotary, q, k)
            return cached.attend(q, k, v, kernel=self.kernel)
        if self.rotary is not None:
            q, k = self._rotate(q, k, positions, documents)
            if self.q_norm is None and torch.is_grad_enabled():
                v = v.contiguous()  # a view would keep the unrotated q and k in memory for the backward
        elif positions is not None:
            raise ValueError("positions must be None where rotary is None: nothing would read them")
        return self._attended(q, k, v, self.pattern, documents, key_padding_mask)

    def _projected(self, out: Tensor) -> Tensor:
        """Concatenate the heads of the output of attention (B, N, H, D), and project them."""
        out = out.flatten(2)
        if self.sub_norm is not None:
            out = self.sub_norm(out)
        return projected(self.out_proj, out)

    def _rotate(self, q: Tensor, k: Tensor, positions: Tensor | None, documents: Tensor | None) -> Any:
        """Rotate q (B, N, H, D) and k (B, N, Hkv, D), by their index in the document where `positions` is None."""
        assert self.rotary is not None
        tokens = q.shape[1]
        is_long = tokens > ROTATED_TOKENS and not torch.is_grad_enabled() and not self._is_hooked()
        if positions is None and documents is None and not self.is_split and not is_long:
            return self.rotary(q, k)
        index = places_of(q, documents, self.sequence_context)
        if not is_long:
            return self.rotary(q, k, index) if positions is None else self.rotary(q, k, positions, index=index)
        for begin in range(0, tokens, ROTATED_TOKENS):  # in place: no backward reads them before the rotation
            some = slice(begin, begin + ROTATED_TOKENS)
            own = None if positions is None else positions[..., some]
            options = {"positions": index[..., some]} if own is None else {"positions": own, "index": index[..., some]}
            q[:, some], k[:, some] = self.rotary(q[:, some], k[:, some], **options)
        return q, k

    def _is_hooked(self) -> bool:
        """Return whether someone may have kept q and k as a hook saw them."""
        return any(each is not None and each._forward_hooks for each in (self.qkv_proj, self.q_norm, self.k_norm))

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, {self.num_heads}, {shown_pattern(self.pattern)}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, dropout={self.dropout}, gain={self.gain:.4g}, mix={self.mix!r}"
        )
