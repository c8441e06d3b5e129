"""Patterns: which keys a query may see.  A pattern is a tuple of branches, with one softmax over all that they show."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import lcm
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_longnet.attention.pattern.branch import Branch, HeadOffsets, Ragged, check_one_of, from_keywords
from lightning_longnet.attention.pattern.sparsity import Sparsity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from lightning_longnet.attention.pattern.sparsity import BlockKind

__all__ = ["Branch", "HeadOffsets", "Multiplicity", "Pattern", "Ragged", "Reach", "check_heads"]

Multiplicity = Literal["multiset", "set"]


class Reach(NamedTuple):
    """How far information travels through a pattern in a model of any depth, and the residues that no head reads.

    Attributes:
        length: the number of tokens of the sequence.
        span: tokens of different multiples of `span` never influence each other, as no branch crosses a multiple of it;
            equal to `length` if there is no such border.
        unserved: each branch that has residues to which no head attends, with these residues.
    """

    length: int
    span: int
    unserved: tuple[tuple[Branch, tuple[int, ...]], ...]

    @property
    def has_gaps(self) -> bool:
        """Whether there is a border or a residue without a head.

        Models (`Blocks`) then warn, and `longnet plan` notes it.
        """
        return self.span < self.length or bool(self.unserved)

    def __str__(self) -> str:
        """Return in words what does not travel, and which options would change that."""
        lines = []
        if self.span < self.length:
            lines.append(
                f"Nothing crosses a multiple of {self.span:,} tokens, at any depth, in a sequence of {self.length:,}: "
                f"make the largest segment_length at least {self.length:,}, or add a window."
            )
        for branch, residues in self.unserved:
            shown = ", ".join(map(str, residues[:8])) + (", ..." if len(residues) > 8 else "")
            width = branch.segment_length or "the whole sequence"
            lines.append(
                f"In the branch w={width}, r={branch.dilation_rate} no head attends to "
                f"{len(residues)} of its {branch.dilation_rate} residues ({shown}): with interleaved offsets, as many "
                f"key/value heads as residues serve them all."
            )
        return "\n".join(lines) or f"No border in {self.length:,} tokens, and a head for every residue."


@dataclass(frozen=True)
class Pattern:
    """A frozen, hashable tuple of branches; `a + b` has the branches of both.

    Args:
        branches: `Branch`es, or the keyword dictionaries of them (as YAML gives them).
        multiplicity: "multiset" counts a key as often as branches show it (LongNet); "set" counts it once.

    >>> Pattern.dilated((4, 8), (1, 2), is_causal=True).mask(8, heads=2)[0, 6].tolist()
    [1, 0, 1, 0, 2, 1, 2, 0]
    """

    branches: tuple[Branch, ...]
    multiplicity: Multiplicity = "multiset"

    def __post_init__(self) -> None:
        """Check the arguments, and make branches of the keywords that YAML gives for them."""
        if isinstance(self.branches, Branch) or not hasattr(self.branches, "__iter__"):
            raise ValueError(f"branches must be a sequence of Branch, got {self.branches!r}")
        branches = tuple(b if isinstance(b, Branch) else from_keywords(Branch, "branches", b) for b in self.branches)
        if not branches:
            raise ValueError("branches must hold at least one Branch, got none")
        object.__setattr__(self, "branches", branches)
        check_one_of("multiplicity", self.multiplicity, get_args(Multiplicity))
        if self.multiplicity == "set" and any(branch.ragged == "zero_keys" for branch in branches):
            raise ValueError(
                "multiplicity must be 'multiset' where a branch has ragged 'zero_keys', got 'set': the padding of each "
                "branch is its own, and torchscale counts all of it"
            )
        # encoded once and here: torch.compile reads an attribute, and could not follow a JSON encoder
        object.__setattr__(self, "_text", json.dumps(self.to_dict(), separators=(",", ":")))

    def __hash__(self) -> int:
        """Return the hash of the pattern's JSON."""
        text: str = self._text  # type: ignore[attr-defined]
        return hash(text)  # a text keeps its hash: hashing all branches would cost at every look into a cache

    @classmethod
    def dilated(
        cls,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        is_causal: bool = False,
        head_offsets: HeadOffsets = "interleaved",
        multiplicity: Multiplicity = "multiset",
        ragged: Ragged = "exact",
    ) -> Pattern:
        """Return LongNet's pattern: one branch for each pair of a segment length and a dilation rate.

        Users call it, and so do `from_torchscale`, the classes of `compat`, exported models of transformers, and the
        trials of `longnet doctor` and of a `Guard`.  `ragged="zero_keys"` attends to padding where a segment is not
        full, as torchscale does; see `Branch`.
        """
        for name, values in (("segment_lengths", segment_lengths), ("dilation_rates", dilation_rates)):
            if not (hasattr(values, "__len__") and hasattr(values, "__getitem__")):
                raise ValueError(f"{name} must be a sequence of integers, got {values!r}")
        if len(segment_lengths) != len(dilation_rates):
            raise ValueError(
                f"segment_lengths and dilation_rates must have the same count, got {len(segment_lengths)} "
                f"({list(segment_lengths)}) and {len(dilation_rates)} ({list(dilation_rates)})"
            )
        pairs = zip(segment_lengths, dilation_rates, strict=True)
        return cls(tuple(Branch(w, r, None, is_causal, head_offsets, None, ragged) for w, r in pairs), multiplicity)

    @classmethod
    def dense(cls, is_causal: bool = False) -> Pattern:
        """Return the pattern that shows every key: the branch (N, 1).

        Users call it, and exported models of transformers; it is the default of `MultiheadDilatedAttention`.
        """
        return cls((Branch(is_causal=is_causal),))

    @classmethod
    def window(cls, size: int, is_causal: bool = False) -> Pattern:
        """Return the pattern of the nearest keys: `i - size < j <= i` if causal, else `|i - j| < size`.

        Users call it, alone or added to another pattern, and exported models of transformers for their sliding windows.
        """
        return cls((Branch(window=size, is_causal=is_causal),))

    @classmethod
    def block_sparse(
        cls,
        kind: BlockKind,
        block_size: int,
        sparsity_ratio: float,
        *,
        within: Pattern,
        global_tokens: int | None = None,
        varies_over_heads: bool = False,
    ) -> Pattern:
        """Return the pattern `within`, of which only some blocks are kept.

        The rows of one segment and residue are cut into blocks of `block_size`, and of their blocks of pairs the share
        `sparsity_ratio` is kept; see `Sparsity` for the kinds, and which blocks each of them prefers.  Users call it,
        and `Preset.pattern_of` for the preset "block_sparse".

        >>> dense = Pattern.dense(is_causal=True)
        >>> Pattern.block_sparse("local_window", 2, 0.5, within=dense).mask(8, heads=1)[0, 6].tolist()
        [0, 0, 0, 0, 1, 1, 1, 0]
        """
        if not isinstance(within, Pattern):
            raise ValueError(f"within must be a Pattern, some blocks of which are kept, got {within!r}")
        if any(branch.sparsity for branch in within.branches):
            raise ValueError(f"within must keep all of its blocks, got {within!r}")
        sparsity = Sparsity(kind, block_size, sparsity_ratio, global_tokens, varies_over_heads)
        return cls(tuple(replace(branch, sparsity=sparsity) for branch in within.branches), within.multiplicity)

    @property
    def is_causal(self) -> bool:
        """Whether all branches are causal.

        `check_ordering`, the estimates of plans, models, caches and pictures ask.
        """
        return all(branch.is_causal for branch in self.branches)

    @property
    def has_null_keys(self) -> bool:
        """Whether a query may attend to null keys; see `null_keys`.

        `_line_call` and `RankCall.pair_options` ask before they make `NullKeys`, pictures and `longnet convert` before
        they mention them.
        """
        return any(branch.has_null_keys for branch in self.branches)

    def __add__(self, other: Pattern) -> Pattern:
        """Return the pattern with the branches of both, which must have one multiplicity."""
        if not isinstance(other, Pattern):
            return NotImplemented
        if self.multiplicity != other.multiplicity:
            raise ValueError(
                f"both sides of a + b must have one multiplicity, got {self.multiplicity!r} and {other.multiplicity!r}"
            )
        return Pattern(self.branches + other.branches, self.multiplicity)

    def ordered(self) -> tuple[Branch, ...]:
        """Return the branches from the finest to the coarsest: by dilation rate, then segment length, then window.

        The index of a branch in plans, kernels and exchanges is its place here.  In a "set" the first that shows a pair
        has it.  Plans, lines, the kernel "reference", caches of inference and reports ask for it.
        """
        whole = float("inf")
        return tuple(
            sorted(self.branches, key=lambda b: (b.dilation_rate, b.segment_length or whole, b.window or whole))
        )

    def visible(self, tokens: Tensor, kv_heads: int) -> list[Tensor]:
        """Return which pairs each branch shows, by the definition: booleans (Hkv, N, N), in the order of `ordered()`.

        The other kernels are compared with this definition; `mask` and the kernel "reference" compute with it.

        `tokens`, (N,), are the places of the tokens in their documents: 0, 1, ... for each whole document.
        """
        shown = [branch.visible(tokens, kv_heads) for branch in self.ordered()]
        if self.multiplicity == "set":
            for i in range(len(shown) - 1, 0, -1):
                shown[i] = shown[i] & ~torch.stack(shown[:i]).any(0)
        return shown

    def mask(self, length: int, heads: int, kv_heads: int | None = None) -> Tensor:
        """Return how often query `i` of head `h` counts key `j`, an integer (H, N, N), for people and for tests.

        Pictures are drawn of it (`draw_pattern`, and `pattern_pictures` of a report); kernels do not call it.
        """
        kv_heads = check_heads(heads, kv_heads)
        if length < 0:
            raise ValueError(f"length must not be negative, got {length}")
        counts = torch.stack(self.visible(torch.arange(length), kv_heads)).sum(0)
        return counts.repeat_interleave(heads // kv_heads, dim=0)

    def null_keys(self, length: int, heads: int, kv_heads: int | None = None) -> Tensor:
        """Return how many null keys, of score 0 and value 0, each query counts beside the keys of `mask`: (H, N).

        It is for people and for tests; kernels ask `Branch.null_keys`.

        >>> Pattern.dilated((4,), (1,), ragged="zero_keys").null_keys(6, heads=1).tolist()
        [[0, 0, 0, 0, 2, 2]]
        """
        kv_heads = check_heads(heads, kv_heads)
        if length < 0:
            raise ValueError(f"length must not be negative, got {length}")
        tokens = torch.arange(length)
        lengths = torch.full_like(tokens, length)
        counts = torch.stack([branch.null_keys(tokens, lengths, kv_heads) for branch in self.branches]).sum(0)
        return counts.repeat_interleave(heads // kv_heads, dim=0)

    def reach(self, length: int, heads: int, kv_heads: int | None = None) -> Reach:
        """Return how far information travels in a sequence of `length` tokens at any depth; see `Reach`.

        Models call it once, to warn, and `longnet plan` for its notes.
        """
        kv_heads = check_heads(heads, kv_heads)
        lengths = [b.border_spacing(length) for b in self.branches if b.connects(length)]
        span = min(lcm(*lengths), length)  # a border of every branch is one that no layer crosses
        unserved = []
        for branch in self.branches:
            served = {branch.offset(g, kv_heads) for g in range(kv_heads)}
            width = min(branch.dilation_rate, branch.segment_length or length, length)
            if missing := tuple(o for o in range(width) if o not in served):
                unserved.append((branch, missing))
        return Reach(length, span, tuple(unserved))

    def plot(self, length: int | None = None, heads: int | None = None, kv_heads: int | None = None) -> Figure:
        """Return a figure of the keys that each query sees, a panel for each kind of head.

        It needs matplotlib (the extra `plots`).  Users call it, and `write_images` for the report of a run.  For the
        defaults see `draw_pattern`.
        """
        from lightning_longnet.attention.pattern.picture import draw_pattern

        return draw_pattern(self, length, heads, kv_heads)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for YAML or JSON: `Pattern(**pattern.to_dict()) == pattern`.

        Reports, plans, configurations of models and saved caches hold them.
        """
        return {"branches": [asdict(branch) for branch in self.branches], "multiplicity": self.multiplicity}

    def dumps(self) -> str:
        """Return one line of JSON, as an operator takes a pattern as an argument and as ranks compare it.

        `AttentionSpec.dumps` calls it in each call of `attend`, and `call_kind` where sequences are split.
        """
        text: str = self._text  # type: ignore[attr-defined]
        return text

    @staticmethod
    def loads(text: str) -> Pattern:
        """Return the pattern of a line of `dumps`; the results are cached.

        `AttentionSpec.loads` calls it, for the operators.
        """
        return _loads(text)


@lru_cache(1024)
def _loads(text: str) -> Pattern:
    """Return the pattern of a line of `Pattern.dumps`; equal lines give the same object."""
    return Pattern(**json.loads(text))


def check_heads(heads: int, kv_heads: int | None) -> int:
    """Return the number of key/value heads, or raise a ValueError if it does not divide the number of query heads.

    None stands for as many key/value heads as query heads.  Patterns, plans, layers and models call it for their
    arguments.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, both at least 1, got {heads} and {kv_heads}")
    return kv_heads
