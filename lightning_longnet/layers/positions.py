"""Rotary position embeddings: rotations of q and k after which a score depends on the distance of the two tokens."""

from __future__ import annotations

from functools import lru_cache
from math import ceil, lcm, log
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lightning_longnet.layers.options import pattern_of, positive_integer, positive_number, require

if TYPE_CHECKING:
    from lightning_longnet.attention.pattern.pattern import Pattern

Kind = Literal["rope", "xpos"]
# Cosine and sine of the angles of each pair, (N or B x N, 1, head_dim / 2, 2), for q and for k
Factors = tuple[Tensor, Tensor]
# Numbers up to which the factors of the tokens 0 to N - 1 are kept between calls, and how many such tables are
LARGEST_TABLE, TABLES = 2**21, 4

# xPos scales the first pair of a head by ZETA ** (position / scale_base); other pairs by factors closer to 1
ZETA = 0.4 / 1.4
# The largest power of e by which q and k are scaled.  k grows by that factor, and a masked score by its square.
# float32 and bfloat16 overflow at e^88, float16 at e^11
LARGEST_POWER = 41.0
LARGEST_POWER_OF_HALF = 6.0


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class RotaryPositions(nn.Module):
    """Rotate the pairs (0, 1), (2, 3), ... of each head, pair i by the angle `position * base ** (-2 i / head_dim)`.

    The pairs are adjacent, as in RoFormer and torchscale; other implementations pair the two halves of a head.  Angles
    are computed in float64: float32 would be off by half a radian at ten million tokens.  There are no buffers, and no
    maximal sequence length.

    "xpos" (arXiv 2212.10554) also multiplies pair i of q by `zeta_i ** (position / scale_base)` and divides pair i of k
    by it, with `zeta_i = (2 i / head_dim + 0.4) / 1.4`.  Scores decrease with the distance of a key before its query
    and increase with that of a key after it, so xpos is meant for causal patterns.  Such powers overflow for large
    positions.  The exponent is therefore counted from the middle of the pattern's segment that holds the token, which
    changes no score within a segment.  A segment that is too long is refused.  Where the branches have no common
    segments, the exponent is counted from position 0, and a position that is too large is refused.

    Args:
        head_dim: width of a head, even.
        base: base of the wavelengths.
        kind: "rope" or "xpos".
        scale_base: scale of the exponent of xPos.  With a larger one scores decrease more slowly, and longer segments
            are allowed.
        pattern: the pattern that the tokens attend by; xPos reads the segment lengths from it.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10000.0,
        kind: Kind = "rope",
        scale_base: float = 512.0,
        pattern: Pattern | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if positive_integer("head_dim", head_dim) % 2:
            raise ValueError(f"head_dim must be even, as pairs are turned, got {head_dim}")
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(map(repr, get_args(Kind)))}, got {kind!r}")
        self.head_dim, self.kind, self.base = head_dim, kind, positive_number("base", base)
        self.scale_base = positive_number("scale_base", scale_base)
        self.segment_length = None
        if kind == "xpos" and pattern is not None:
            self.segment_length = self._common_segment(pattern_of(pattern))
        # made here, because torch.compile does not trace the formatting of text
        self._rules = {dtype: self._rule(dtype) for dtype in _DTYPES}

    def forward(
        self, q: Tensor, k: Tensor, positions: Tensor | None = None, *, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return q and k, rotated, in their own shapes and dtypes.

        Args:
            q: (B, N, H, head_dim).
            k: (B, N, Hkv, head_dim).
            positions: integers (N,) or (B, N); 0 to N - 1 by default.
            index: integers (N,) or (B, N), the index of each token in its document, which determines its segment; the
                same as `positions` by default.
        """
        return self.turned(q, k, self.factors(q, k, positions, index=index))

    def turned(self, q: Tensor, k: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
        """Return q and k, rotated by what `factors` returned for tokens at the same positions."""
        if self.kind == "rope" and q.shape[1] == 1:  # of one token, two tensors take twice the time of one
            both = _rotate(torch.cat((q, k), 2), factors[0])
            turned_q, turned_k = both.split((q.shape[2], k.shape[2]), 2)
            return turned_q, turned_k
        return _rotate(q, factors[0]), _rotate(k, factors[1])

    def factors(self, q: Tensor, k: Tensor, positions: Tensor | None = None, *, index: Tensor | None = None) -> Factors:
        """Return the factors of the rotation of q, and those of k; see `forward` for the arguments."""
        for name, x in (("q", q), ("k", k)):
            if x.dim() != 4 or x.shape[3] != self.head_dim:
                raise ValueError(f"{name} must be (batch, tokens, heads, {self.head_dim}), got shape {tuple(x.shape)}")
        if self.kind == "xpos":
            self._check_reach(q, positions is None)
        compute_dtype = torch.promote_types(q.dtype, torch.float32)
        if positions is None and self.kind == "rope" and _is_kept(q):
            turns = _table(q.shape[1], self.head_dim, self.base, compute_dtype)
            return turns, turns
        places = _tokens(q) if positions is None else checked_positions(positions, q)
        turns = _turns(places, self.head_dim, self.base, compute_dtype)
        if self.kind == "rope":
            return turns, turns
        distance = places - self._middle(places if index is None else checked_positions(index, q, "index"))
        if index is not None or (positions is not None and self.segment_length is None):
            self._check_distance(q, distance)
        zeta = (_pairs(self.head_dim, q.device) + 0.4) / 1.4
        powers = distance.double()[..., None, None] / self.scale_base * zeta.log()
        scale = powers.exp().to(compute_dtype).unsqueeze(-1)
        return turns * scale, turns / scale

    def reach(self, dtype: torch.dtype = torch.float32) -> int:
        """Return the largest distance in tokens from the origin of the exponent of xPos at which `dtype` is safe."""
        power = LARGEST_POWER_OF_HALF if dtype == torch.float16 else LARGEST_POWER
        return int(power * self.scale_base / -log(ZETA))

    def _common_segment(self, pattern: Pattern) -> int | None:
        """Return the least common multiple of the segment lengths of the branches.

        A segment of that length holds a whole number of the segments of every branch, so a query and its keys are
        always in the same one.  Return None where a branch has no segments, or where the multiple exceeds the reach.
        """
        lengths = [branch.segment_length for branch in pattern.branches if branch.segment_length is not None]
        if longest := max(lengths, default=0):
            self._check_segment(longest, torch.float32)
        common = lcm(*lengths)
        return common if len(lengths) == len(pattern.branches) and common <= 2 * self.reach() else None

    def _middle(self, index: Tensor) -> Tensor | int:
        """Return the origin of the exponent for each token: the middle of its segment, or 0 without segments."""
        if self.segment_length is None:
            return 0
        return index // self.segment_length * self.segment_length + self.segment_length // 2

    def _check_segment(self, length: int, dtype: torch.dtype) -> None:
        if length > 2 * self.reach(dtype):
            raise ValueError(
                f"xpos with scale_base {self.scale_base:g} takes segments of at most {2 * self.reach(dtype):,} tokens "
                f"in {dtype}, the pattern's are {length:,}: {self._advice(length / 2, dtype)}"
            )

    def _check_reach(self, q: Tensor, counted: bool) -> None:
        """Refuse what can be refused without reading positions.  `counted` says that they are 0 to N - 1."""
        dtype, length = _score_dtype(q), q.shape[1]
        if self.segment_length is not None:
            self._check_segment(self.segment_length, dtype)
        elif counted and length - 1 > self.reach(dtype):
            raise ValueError(
                f"xpos with scale_base {self.scale_base:g} takes positions up to {self.reach(dtype):,} in {dtype} "
                f"where the pattern's branches share no segment, got {length:,} tokens: {self._advice(length, dtype)}"
            )

    def _check_distance(self, q: Tensor, distance: Tensor) -> None:
        dtype = _score_dtype(q)
        require(distance.abs() <= self.reach(dtype), distance, self._rules[dtype])

    def _rule(self, dtype: torch.dtype) -> str:
        place = "0" if self.segment_length is None else "the middle of a token's segment"
        return (
            f"xpos with scale_base {self.scale_base:g} takes positions at most {self.reach(dtype):,} from {place} in "
            f"{dtype} (raise scale_base, or use rope)"
        )

    def _advice(self, distance: float, dtype: torch.dtype) -> str:
        needed = ceil(distance / self.reach(dtype) * self.scale_base)
        return f"raise scale_base to {needed:,}, or use rope"

    def extra_repr(self) -> str:
        text = f"{self.head_dim}, kind={self.kind!r}, base={self.base:g}"
        if self.kind == "rope":
            return text
        return f"{text}, scale_base={self.scale_base:g}, segment_length={self.segment_length}"


def _tokens(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device)


def _pairs(head_dim: int, device: torch.device) -> Tensor:
    """Return 2 i / head_dim for each pair i."""
    return torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim


def _turns(places: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> Tensor:
    """Return cosine and sine of the angles at places (N,) or (B, N), (N or B x N, 1, head_dim / 2, 2)."""
    angles = places.double()[..., None, None] * base ** -_pairs(head_dim, places.device)
    return torch.stack((angles.cos(), angles.sin()), -1).to(dtype)


def _is_kept(q: Tensor) -> bool:
    """Return whether the factors of the tokens of q are kept: plain tensors on a CPU, of sequences that are not long.

    A compiler records how they are computed instead, and a captured graph of CUDA would keep their memory.
    """
    is_plain = q.is_cpu and type(q) is Tensor and not torch.compiler.is_compiling()
    return is_plain and q.shape[1] * q.shape[3] <= LARGEST_TABLE


@lru_cache(TABLES)
def _table(tokens: int, head_dim: int, base: float, dtype: torch.dtype) -> Tensor:
    """Return what `_turns` returns for the tokens 0 to N - 1, which all layers and steps share."""
    # a later call may train, and need not be under the modes and transforms of this one
    with _disable_current_modes(), torch._C._DisableFuncTorch(), torch.inference_mode(False), torch.no_grad():
        return _turns(torch.arange(tokens, device="cpu"), head_dim, base, dtype)


def _rotate(x: Tensor, factors: Tensor) -> Tensor:
    """Rotate the adjacent pairs of x (B, N, heads, head_dim) by factors that end in (N, 1, head_dim / 2, 2)."""
    pairs = x.unflatten(-1, (-1, 2)).to(factors.dtype)
    has_complex = x.device.type in ("cpu", "cuda", "meta")
    if torch.compiler.is_compiling() or not has_complex:  # no compiler fuses complex products
        (even, odd), (cos, sin) = pairs.unbind(-1), factors.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    else:  # one product, where the above takes seven passes over memory
        turned = torch.view_as_real(_as_complex(pairs) * torch.view_as_complex(factors))
    return turned.flatten(-2).to(x.dtype)


def _as_complex(pairs: Tensor) -> Tensor:
    """Return a complex view of pairs (..., 2), of a copy where some stride is odd."""
    is_even = pairs.stride(-1) == 1 and not any(n % 2 for n in (*pairs.stride()[:-1], pairs.storage_offset()))
    return torch.view_as_complex(pairs if is_even else pairs.clone(memory_format=torch.contiguous_format))


def _score_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype in which `attend` computes the scores of q: under autocast, the one that autocast casts to."""
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return q.dtype


def checked_positions(positions: Tensor, x: Tensor, name: str = "positions") -> Tensor:
    """Check integers (N,) or (B, N) for the tokens of x (B, N, ...), and return them as int64.

    `name` is the argument that errors name.
    """
    if not isinstance(positions, Tensor):
        raise ValueError(f"{name} must be a tensor of integers, got {type(positions).__name__}")
    if positions.dtype.is_floating_point or positions.dtype.is_complex or positions.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {positions.dtype}")
    if positions.device != x.device:
        raise ValueError(f"{name} must be on the device of the tokens, {x.device}, got {positions.device}")
    if positions.dim() not in (1, 2) or positions.shape != x.shape[2 - positions.dim() : 2]:
        raise ValueError(
            f"{name} must be (tokens,) or (batch, tokens), {tuple(x.shape[1:2])} or {tuple(x.shape[:2])}, "
            f"got {tuple(positions.shape)}"
        )
    return positions.long()  # narrow and unsigned integers would wrap around


def document_index(documents: Tensor) -> Tensor:
    """Return the index of each token in its document, given document ids (N,) or (B, N) that do not decrease."""
    places = torch.arange(documents.shape[-1], device=documents.device).expand(documents.shape)
    begins = documents.diff(dim=-1, prepend=documents[..., :1]) != 0
    return places - torch.where(begins, places, 0).cummax(-1).values
