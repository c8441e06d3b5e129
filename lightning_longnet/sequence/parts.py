"""`SequencePart`: a batch of which a rank holds its own tokens only, so that no rank reads the others' tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lightning_longnet.attention.parallel.placement import Placement


@dataclass
class SequencePart:
    """The part of sequences that a rank holds, cut when it was read; `SequenceContext.split` does not cut it again.

    A dataset makes one of each sample: `sequence_context(module).placement_of(length).chunks(rank)` are the tokens
    to read.  It is a dataclass and no dictionary, so that length, stretches and samples stay with the tensors when a
    loader collates and pins them, or a plugin maps them.

    Args:
        tensors: the tensors by name, with this rank's tokens in the order in which it holds them.
        length: the number of tokens of the whole sequences.
        stretches: the begin and end of each stretch of tokens that this rank holds, in the whole sequences.
        samples: a unique name of each sample.  Ranks that share sequences compare these, as their values differ.
    """

    tensors: dict[str, Tensor]
    length: int
    stretches: tuple[tuple[int, int], ...]
    samples: tuple[str, ...]

    def __post_init__(self) -> None:
        self.stretches = tuple((begin, end) for begin, end, *_ in self.stretches)
        self.samples = tuple(self.samples)

    @property
    def tokens(self) -> int:
        """The number of tokens of each sequence on this rank."""
        return sum(end - begin for begin, end in self.stretches)

    def check(self, placement: Placement, rank: int) -> None:
        """Raise a ValueError where this is not the part that a placement gives to a rank."""
        expected = tuple((begin, end) for begin, end, _ in placement.chunks(rank))
        if self.stretches != expected:
            raise ValueError(
                f"a SequencePart must hold the tokens {_ranges_text(expected)} of {self.length} on rank {rank} of the "
                f"{placement.ranks} that share a sequence, got {_ranges_text(self.stretches)}: cut it by "
                f"sequence_context(module).placement_of({self.length})"
            )

    def digest(self) -> int:
        """Return a number that parts of the same samples share, whichever tokens they hold."""
        kinds = [(name, str(value.dtype)) for name, value in sorted(self.tensors.items())]
        content = sha256(repr((self.length, self.samples, kinds)).encode())
        return int.from_bytes(content.digest()[:7], "big")

    def to(self, device: torch.device | str, **settings: Any) -> SequencePart:
        """Return the part with its tensors on a device."""
        return self._mapped(lambda x: x.to(device, **settings))

    def pin_memory(self) -> SequencePart:
        """Return the part with its tensors in pinned memory."""
        return self._mapped(lambda x: x.pin_memory())

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> SequencePart:
        return replace(self, tensors={name: function(x) for name, x in self.tensors.items()})


def collate_parts(parts: Sequence[SequencePart], **_: Any) -> SequencePart:
    """Collate the parts of several samples into that of a batch; all must have the same length and stretches."""
    first = parts[0]
    for part in parts:
        if (part.length, part.stretches) != (first.length, first.stretches):
            raise ValueError(
                f"all parts of a batch must be of sequences of the same length and cut alike, got "
                f"{_ranges_text(first.stretches)} of {first.length} and {_ranges_text(part.stretches)} of {part.length}"
            )
    tensors = default_collate([part.tensors for part in parts])
    return replace(first, tensors=tensors, samples=tuple(name for part in parts for name in part.samples))


# any DataLoader must collate them by this function: torch's own keeps only the first sample's name
default_collate_fn_map[SequencePart] = collate_parts


def part_of(x: Tensor, placement: Placement, rank: int, dim: int) -> Tensor:
    """Return the tokens of a rank, in the order in which it holds them; a copy, so that the whole can be freed."""
    parts = [x.narrow(dim, begin, end - begin) for begin, end, _ in placement.chunks(rank)]
    return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0).clone()


def _ranges_text(stretches: Sequence[tuple[int, int]]) -> str:
    return " and ".join(f"{begin} to {end}" for begin, end in stretches) or "none"
