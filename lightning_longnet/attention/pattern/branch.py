"""One branch of a pattern: a segment length and a dilation rate, or a window."""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import index
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from lightning_longnet.attention.pattern.sparsity import Sparsity

T = TypeVar("T")
HeadOffsets = Literal["interleaved", "blocked"]


def _positive(name: str, value: Any) -> int:
    # bool is an int to Python, but True is no segment length; numpy's integers are none to JSON
    if not hasattr(value, "__index__") or isinstance(value, bool) or not 0 < index(value) < 2**63:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return index(value)


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


@dataclass(frozen=True)
class Branch:
    """Query `i` of key/value head `g` belongs to a branch iff `(i mod w) mod r == offset(g)`.

    There it sees the keys of its own segment with the same residue: `j // w == i // w`, `(j mod w) mod r == offset(g)`;
    only `j <= i` where causal, only nearer than `window` where there is one, and only those in blocks that are kept
    where there is a sparsity.

    Args:
        segment_length: `w`; None is the whole sequence.
        dilation_rate: `r`; every r-th row of a segment is kept, another residue for each head.
        window: tokens seen at most, counted backwards from the query (and forwards, where not causal).
        is_causal: hide the keys after the query.
        head_offsets: "interleaved" is `g mod r` (the paper), "blocked" `g // ceil(Hkv / r)` (torchscale's checkpoints).
        sparsity: which blocks of the rows of a segment and residue are kept; None keeps all.
    """

    segment_length: int | None = None
    dilation_rate: int = 1
    window: int | None = None
    is_causal: bool = False
    head_offsets: HeadOffsets = "interleaved"
    sparsity: Sparsity | None = None

    def __post_init__(self) -> None:
        for name in ("segment_length", "dilation_rate", "window"):
            value = getattr(self, name)
            if value is not None or name == "dilation_rate":
                object.__setattr__(self, name, _positive(name, value))
        one_of("head_offsets", self.head_offsets, get_args(HeadOffsets))
        if not isinstance(self.is_causal, bool):
            raise ValueError(f"is_causal must be True or False, got {self.is_causal!r}")
        sparsity: Any = self.sparsity
        if isinstance(sparsity, dict):
            object.__setattr__(self, "sparsity", made(Sparsity, "sparsity", sparsity))
        elif sparsity is not None and not isinstance(sparsity, Sparsity):
            raise ValueError(f"sparsity must be a Sparsity or None, got {sparsity!r}")
        if self.sparsity is not None and self.window is not None:
            raise ValueError(
                f"sparsity must be None where there is a window, got both, window {self.window}: the kind "
                f"'local_window' keeps the near blocks of a branch without one"
            )

    def offset(self, kv_head: int, kv_heads: int) -> int:
        """Return the residue of a key/value head.  It depends on that head, so that a GQA group shares its rows."""
        if self.head_offsets == "interleaved":
            return kv_head % self.dilation_rate
        return kv_head // -(-kv_heads // self.dilation_rate)

    def connects(self, length: int) -> bool:
        """Return whether a query sees any key but its own."""
        return min(self.border(length), self.window or length) > self.dilation_rate

    def border(self, length: int) -> int:
        """Return the distance of the borders that this branch never crosses."""
        width = min(self.segment_length or length, length)
        if self.sparsity is not None:
            own = self.sparsity.block_size * self.dilation_rate
            kept = self.sparsity.kept(-(-width // self.dilation_rate), 0, self.is_causal)
            if width % own == 0 and all(len(row) == 1 for row in kept):
                return own
        return width

    def visible(self, tokens: Tensor, kv_heads: int) -> Tensor:
        """Return the definition as a boolean mask (Hkv, N, N); `tokens` are the indices of all in their documents."""
        segment, place = tokens * 0, tokens
        if self.segment_length is not None:
            segment, place = tokens // self.segment_length, tokens % self.segment_length
        offsets = torch.tensor([self.offset(g, kv_heads) for g in range(kv_heads)], device=tokens.device)
        member = place % self.dilation_rate == offsets[:, None]
        seen = member[:, :, None] & member[:, None, :] & (segment[:, None] == segment)
        distance = tokens[:, None] - tokens
        if self.is_causal:
            seen &= distance >= 0
        if self.window is not None:
            seen &= distance.abs() < self.window
        if self.sparsity is not None:
            document = (tokens == 0).cumsum(0)
            lengths = document.bincount()[document]
            seen &= torch.stack([self.keeps(tokens, lengths, g, kv_heads) for g in range(kv_heads)])
        return seen

    def keeps(self, tokens: Tensor, lengths: Tensor, kv_head: int, kv_heads: int) -> Tensor:
        """Whether the block of a query keeps the block of a key of its own set, (N, N), for tokens that a head serves.

        `lengths` are those of the tokens' documents: the last segment may be shorter.
        """
        assert self.sparsity is not None
        found = torch.zeros(len(tokens), len(tokens), dtype=torch.bool, device=tokens.device)
        width, offset = lengths, self.offset(kv_head, kv_heads)
        place = tokens
        if self.segment_length is not None:
            place = tokens % self.segment_length
            width = (lengths - (tokens - place)).clamp(max=self.segment_length)
        rows = torch.where(place % self.dilation_rate == offset, -(-(width - offset) // self.dilation_rate), 0)
        for count in set(rows.tolist()) - {0}:
            at = (rows == count).nonzero().flatten()
            blocks = self.sparsity.blocks(count)
            table = torch.zeros(blocks, blocks, dtype=torch.bool, device=tokens.device)
            for block, kept in enumerate(self.sparsity.kept(count, kv_head, self.is_causal)):
                table[block, list(kept)] = True
            blocks_at = place[at] // self.dilation_rate // self.sparsity.block_size
            found[at[:, None], at] = table[blocks_at[:, None], blocks_at]
        return found


def made(cls: type[T], name: str, keywords: Any) -> T:
    """Return an object made from keyword arguments, as YAML gives them."""
    allowed = [each.name for each in fields(cls)]  # type: ignore[arg-type]
    if not isinstance(keywords, dict) or not set(keywords) <= set(allowed):
        what = "Branches or dictionaries" if name == "branches" else f"a {cls.__name__} or a dictionary"
        raise ValueError(f"{name} must be {what} of {', '.join(allowed)}, got {keywords!r}")
    return cls(**keywords)
