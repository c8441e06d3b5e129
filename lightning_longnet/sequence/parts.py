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
    """The tokens of sequences that one rank holds, for datasets that read no more than these.

    A dataset makes one of each sample: `sequence_context(module).placement_of(length).chunks(rank)` are the tokens to
    read.  A DataLoader collates them into one of the batch by `collate_parts`, and `SequenceContext.split` returns its
    tensors as a dictionary, without cutting them.  It is a dataclass and no dictionary, so that length, stretches and
    samples stay with the tensors when a loader collates and pins them, or a plugin maps them.

    Args:
        tensors: the tensors by name, with this rank's tokens in the order in which it holds them.
        length: the number N of tokens of the whole sequences.
        stretches: (begin, end) of each stretch of consecutive tokens that this rank holds, in the whole sequences.
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
        """The number L of tokens of each sequence on this rank, by the stretches; `BatchSplitter._check_part` asks."""
        return sum(end - begin for begin, end in self.stretches)

    def check_stretches(self, placement: Placement, rank: int) -> None:
        """Raise a ValueError if `stretches` are not those that a placement gives to a rank.

        The tensors are not looked at.  `BatchSplitter._check_part` calls it: before a step, where ranks compare their
        batches and all raise the error, and in `split`.
        """
        expected = tuple((begin, end) for begin, end, _ in placement.chunks(rank))
        if self.stretches != expected:
            raise ValueError(
                f"a SequencePart must hold the tokens {_ranges_text(expected)} of {self.length} on rank {rank} of the "
                f"{placement.ranks} that share a sequence, got {_ranges_text(self.stretches)}: cut it by "
                f"sequence_context(module).placement_of({self.length})"
            )

    def digest(self) -> int:
        """Return a 56-bit hash of the samples' names, the length, and the names and dtypes of the tensors.

        It is equal on all ranks that share sequences; a hash of values and shapes, those of other tokens on each, would
        not be.  `Note.of` and `digest` of batches.py take it in place of theirs.
        """
        kinds = [(name, str(value.dtype)) for name, value in sorted(self.tensors.items())]
        content = sha256(repr((self.length, self.samples, kinds)).encode())
        return int.from_bytes(content.digest()[:7], "big")

    def to(self, device: torch.device | str, **settings: Any) -> SequencePart:
        """Return the part with its tensors on a device; Lightning calls it, as of a tensor, to move a batch.

        Args:
            device: the device.
            settings: keyword arguments of `Tensor.to`, such as `non_blocking`.
        """
        return self._mapped(lambda x: x.to(device, **settings))

    def pin_memory(self) -> SequencePart:
        """Return the part with its tensors in pinned memory; a DataLoader with `pin_memory=True` calls it."""
        return self._mapped(lambda x: x.pin_memory())

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> SequencePart:
        """Return a copy of the part with `function(x)` in place of each tensor x."""
        return replace(self, tensors={name: function(x) for name, x in self.tensors.items()})


def collate_parts(parts: Sequence[SequencePart], **_: Any) -> SequencePart:
    """Return the part of a batch, with the tensors of several samples stacked along a new first dimension.

    torch's `default_collate` calls it in any DataLoader, with keyword arguments that are not used here.  A ValueError
    is raised unless all parts have the same length and stretches.
    """
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
    """Return the tokens of a rank out of whole sequences x, in the order in which the rank holds them.

    It is a copy, so that the whole can be freed.  `BatchSplitter.split` calls it for each tensor of a batch, the
    backward of `GatherSequence` for a gradient, and `whole_like` of the split check for a result.

    Args:
        x: whole sequences, with all N tokens in dimension `dim`.
        placement: which tokens each rank holds.
        rank: the number of the rank in its sequence group.
        dim: the dimension of the tokens.
    """
    parts = [x.narrow(dim, begin, end - begin) for begin, end, _ in placement.chunks(rank)]
    return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0).clone()


def _ranges_text(stretches: Sequence[tuple[int, int]]) -> str:
    """Return "0 to 4 and 12 to 16" for an error message; "none" without stretches."""
    return " and ".join(f"{begin} to {end}" for begin, end in stretches) or "none"
