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
Ragged = Literal["exact", "zero_keys"]


def _positive(name: str, value: Any) -> int:
    """Return the value as an int, or raise a ValueError if it is not a positive integer."""
    # index() turns numpy's integers into ints, which JSON can write; a bool is an int to Python, but no segment length
    if not hasattr(value, "__index__") or isinstance(value, bool) or not 0 < index(value) < 2**63:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return index(value)


def check_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError if the value of an argument is not one of those allowed.

    `Branch`, `Pattern` and `from_torchscale` call it for arguments that have a few allowed values.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


@dataclass(frozen=True)
class Branch:
    """A branch of a pattern: segments of `w` tokens, of which each head attends to every `r`-th.

    Query `i` of key/value head `g` is in the branch iff `(i mod w) mod r == offset(g)`.  It sees the keys `j` of its
    own segment with the same residue: `j // w == i // w` and `(j mod w) mod r == offset(g)`.  A causal branch shows
    only `j <= i`, a window only `|i - j| < window`, and a sparsity only the keys in blocks that it keeps.

    Args:
        segment_length: `w`; None is the whole sequence.
        dilation_rate: `r`; the rows of one residue modulo `r` are kept, and `offset` gives each head a residue.
        window: the number of tokens that a query may see, counted backwards from itself (and forwards, if not causal).
        is_causal: whether the keys after the query are masked.
        head_offsets: "interleaved" is `g mod r` (the paper), "blocked" `g // ceil(Hkv / r)` (torchscale's checkpoints).
        sparsity: which blocks of the rows of a segment and residue are kept; None keeps all.
        ragged: "exact" attends to tokens alone.  "zero_keys" pads as torchscale does, whose encoders were trained so:
            each segment has `min(w, N)` tokens, padded to a multiple of `r`, and a query of a segment that is not full
            also attends to that padding, keys of score 0 and value 0 (see `null_keys`).  A causal branch masks them.
    """

    segment_length: int | None = None
    dilation_rate: int = 1
    window: int | None = None
    is_causal: bool = False
    head_offsets: HeadOffsets = "interleaved"
    sparsity: Sparsity | None = None
    ragged: Ragged = "exact"

    def __post_init__(self) -> None:
        """Check the arguments, and make a `Sparsity` of the keywords that YAML gives for one."""
        for name in ("segment_length", "dilation_rate", "window"):
            value = getattr(self, name)
            if value is not None or name == "dilation_rate":
                object.__setattr__(self, name, _positive(name, value))
        check_one_of("head_offsets", self.head_offsets, get_args(HeadOffsets))
        check_one_of("ragged", self.ragged, get_args(Ragged))
        if not isinstance(self.is_causal, bool):
            raise ValueError(f"is_causal must be True or False, got {self.is_causal!r}")
        sparsity: Any = self.sparsity
        if isinstance(sparsity, dict):
            object.__setattr__(self, "sparsity", from_keywords(Sparsity, "sparsity", sparsity))
        elif sparsity is not None and not isinstance(sparsity, Sparsity):
            raise ValueError(f"sparsity must be a Sparsity or None, got {sparsity!r}")
        if self.sparsity is not None and self.window is not None:
            raise ValueError(
                f"sparsity must be None where there is a window, got both, window {self.window}: the kind "
                f"'local_window' keeps the near blocks of a branch without one"
            )
        if self.ragged == "zero_keys" and (self.window is not None or self.sparsity is not None):
            given = f"window {self.window}" if self.window is not None else f"sparsity {self.sparsity}"
            raise ValueError(
                f"ragged must be 'exact' where there is a window or a sparsity, got 'zero_keys' and {given}: "
                f"torchscale pads segments without either; a pattern may have both as separate branches"
            )

    def offset(self, kv_head: int, kv_heads: int) -> int:
        """Return the residue modulo `r` of the tokens that a key/value head attends to, counted in their segment.

        It depends on the key/value head, so that the query heads of a GQA group see the same rows.  It is less than
        `r`; masks, plans, caches of inference and pictures ask for it.
        """
        if self.head_offsets == "interleaved":
            return kv_head % self.dilation_rate
        return kv_head // -(-kv_heads // self.dilation_rate)

    def connects(self, length: int) -> bool:
        """Return whether any query may see a key of another token, in a sequence of `length` tokens.

        `Pattern.reach` leaves out the branches for which this is False.
        """
        return min(self.border_spacing(length), self.window or length) > self.dilation_rate

    def border_spacing(self, length: int) -> int:
        """Return the distance in tokens between two borders that no pair of this branch crosses.

        It is the segment length, or the tokens of a block where a sparsity keeps for each block only the block itself.
        `Pattern.reach` and `connects` call it for a sequence of `length` tokens.
        """
        width = min(self.segment_length or length, length)
        if self.sparsity is not None:
            block_tokens = self.sparsity.block_size * self.dilation_rate
            kept = self.sparsity.kept(-(-width // self.dilation_rate), 0, self.is_causal)
            if width % block_tokens == 0 and all(len(row) == 1 for row in kept):
                return block_tokens
        return width

    def border(self, length: int) -> int:
        """Return `border_spacing(length)`, under its former name, for users of earlier releases."""
        return self.border_spacing(length)

    def visible(self, tokens: Tensor, kv_heads: int) -> Tensor:
        """Return which (query, key) pairs the branch shows to each key/value head, by its definition: (Hkv, N, N).

        `Pattern.visible` calls it, for pictures and for the kernel "reference".  `tokens`, (N,), are the places of the
        tokens in their documents: 0, 1, ... for each whole document.  Pairs of two documents have no meaning; the
        caller masks them.
        """
        segment, place = tokens * 0, tokens
        if self.segment_length is not None:
            segment, place = tokens // self.segment_length, tokens % self.segment_length
        offsets = torch.tensor([self.offset(g, kv_heads) for g in range(kv_heads)], device=tokens.device)
        is_served = place % self.dilation_rate == offsets[:, None]  # (Hkv, N): the tokens of a head's residue
        visible = is_served[:, :, None] & is_served[:, None, :] & (segment[:, None] == segment)
        distance = tokens[:, None] - tokens
        if self.is_causal:
            visible &= distance >= 0
        if self.window is not None:
            visible &= distance.abs() < self.window
        if self.sparsity is not None:
            document = (tokens == 0).cumsum(0)  # its number: place 0 begins another one
            lengths = document.bincount()[document]
            visible &= torch.stack([self.keeps(tokens, lengths, g, kv_heads) for g in range(kv_heads)])
        return visible

    @property
    def has_null_keys(self) -> bool:
        """Whether a query may attend to null keys; a causal mask excludes them, as they follow all tokens.

        The kernel "reference" and `NullKeys.add_to` ask before they count null keys, `Pattern.has_null_keys` for any
        branch.
        """
        return self.ragged == "zero_keys" and not self.is_causal

    def null_keys(self, tokens: Tensor, lengths: Tensor, kv_heads: int) -> Tensor:
        """Return how many null keys, of score 0 and value 0, each query counts: integers (Hkv, N).

        They fill the rows of a segment and residue up to those of a whole segment that `r` divides.  `tokens` are the
        places of tokens in their documents, and `lengths` the lengths of these documents, both (N,).  The kernel
        "reference" and `NullKeys.add_to` call it; `Pattern.null_keys` shows the counts.
        """
        if not self.has_null_keys:
            return torch.zeros_like(tokens).expand(kv_heads, -1)
        offsets = torch.tensor([self.offset(g, kv_heads) for g in range(kv_heads)], device=tokens.device)
        width = lengths if self.segment_length is None else lengths.clamp(max=self.segment_length)
        place = tokens % width
        residue = place % self.dilation_rate
        rows = -(-width // self.dilation_rate)
        in_segment = torch.minimum(width, lengths - (tokens - place))
        missing = rows - -(-(in_segment - residue) // self.dilation_rate)
        return torch.where(residue == offsets[:, None], missing, 0)

    def keeps(self, tokens: Tensor, lengths: Tensor, kv_head: int, kv_heads: int) -> Tensor:
        """Return whether the query's block keeps the key's block, a boolean (N, N), for one key/value head.

        Only pairs of one segment and residue have a meaning; `visible` masks the others.  `tokens`, (N,), are the
        places of the tokens in their documents, and `lengths`, (N,), the lengths of these documents, since the last
        segment of a document may be shorter.  `visible` calls it, and the report of a run for its pictures.
        """
        assert self.sparsity is not None
        kept_pairs = torch.zeros(len(tokens), len(tokens), dtype=torch.bool, device=tokens.device)
        width, offset = lengths, self.offset(kv_head, kv_heads)
        place = tokens
        if self.segment_length is not None:
            place = tokens % self.segment_length
            width = (lengths - (tokens - place)).clamp(max=self.segment_length)
        # the number of rows of each token's segment and residue, which decides the blocks; 0 for other residues
        row_counts = torch.where(place % self.dilation_rate == offset, -(-(width - offset) // self.dilation_rate), 0)
        for count in set(row_counts.tolist()) - {0}:  # segments with as many rows have the same blocks
            at = (row_counts == count).nonzero().flatten()
            blocks = self.sparsity.blocks(count)
            table = torch.zeros(blocks, blocks, dtype=torch.bool, device=tokens.device)
            for block, kept in enumerate(self.sparsity.kept(count, kv_head, self.is_causal)):
                table[block, list(kept)] = True
            blocks_at = place[at] // self.dilation_rate // self.sparsity.block_size
            kept_pairs[at[:, None], at] = table[blocks_at[:, None], blocks_at]
        return kept_pairs


def from_keywords(cls: type[T], name: str, keywords: Any) -> T:
    """Return an instance of a dataclass from its keywords, as YAML gives them, or raise a ValueError.

    `Branch` calls it for its sparsity, and `Pattern` for its branches.
    """
    allowed = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    if not isinstance(keywords, dict) or not set(keywords) <= set(allowed):
        what = "Branches or dictionaries" if name == "branches" else f"a {cls.__name__} or a dictionary"
        raise ValueError(f"{name} must be {what} of {', '.join(allowed)}, got {keywords!r}")
    return cls(**keywords)
