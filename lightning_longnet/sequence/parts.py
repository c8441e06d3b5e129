"""A batch of whose sequences a rank was handed its own tokens alone: nobody read the others for it."""

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
    """Tensors of which sequences are cut already; `SequenceContext.split` takes them as they are.

    A dataset makes one of each sample: `sequence_context(module).placement_of(length).stretches(rank)` are the tokens
    to read.  Loaders collate, pin and send them with what is said of them, and so does whatever maps a batch's tensors:
    this is why it is a dataclass, and no dictionary.

    Args:
        tensors: by their names, with this rank's tokens in the order in which the rank holds them.
        length: tokens of the whole sequences.
        stretches: begin and end of what is here, in the whole sequences.
        samples: what the ranks that share the sequences must agree on, for they hold different values: of each sample a
            name that no other has.
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
        """Of each sequence, here."""
        return sum(end - begin for begin, end in self.stretches)

    def check(self, placement: Placement, rank: int) -> None:
        """A ValueError where this is not what the rank is to hold."""
        wanted = tuple((begin, end) for begin, end, _ in placement.stretches(rank))
        if self.stretches != wanted:
            raise ValueError(
                f"a SequencePart must hold the tokens {_shown(wanted)} of {self.length} on rank {rank} of the "
                f"{placement.ranks} that share a sequence, got {_shown(self.stretches)}: cut it by "
                f"sequence_context(module).placement_of({self.length})"
            )

    def digest(self) -> int:
        """A number that parts of the same samples share, whichever tokens they hold."""
        kinds = [(name, str(value.dtype)) for name, value in sorted(self.tensors.items())]
        told = sha256(repr((self.length, self.samples, kinds)).encode())
        return int.from_bytes(told.digest()[:7], "big")

    def to(self, device: torch.device | str, **settings: Any) -> SequencePart:
        return self._mapped(lambda x: x.to(device, **settings))

    def pin_memory(self) -> SequencePart:
        return self._mapped(lambda x: x.pin_memory())

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> SequencePart:
        return replace(self, tensors={name: function(x) for name, x in self.tensors.items()})


def collate_parts(parts: Sequence[SequencePart], **_: Any) -> SequencePart:
    """One of several samples, which are cut in the same way."""
    first = parts[0]
    for part in parts:
        if (part.length, part.stretches) != (first.length, first.stretches):
            raise ValueError(
                f"all parts of a batch must be of sequences of the same length and cut alike, got "
                f"{_shown(first.stretches)} of {first.length} and {_shown(part.stretches)} of {part.length}"
            )
    tensors = default_collate([part.tensors for part in parts])
    return replace(first, tensors=tensors, samples=tuple(name for part in parts for name in part.samples))


# so that a DataLoader of anyone's collates them: torch would keep the first sample's name alone
default_collate_fn_map[SequencePart] = collate_parts


def part_of(x: Tensor, placement: Placement, rank: int, dim: int) -> Tensor:
    """Return the tokens of a rank, in the order in which it holds them; a copy, so that the whole can be freed."""
    parts = [x.narrow(dim, begin, end - begin) for begin, end, _ in placement.stretches(rank)]
    return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0).clone()


def _shown(stretches: Sequence[tuple[int, int]]) -> str:
    return " and ".join(f"{begin} to {end}" for begin, end in stretches) or "none"
