"""Splitting batches: which part of a batch is this rank's, and which sequences layers work on now."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from lightning_longnet.attention.parallel.placement import Kind, Placement
from lightning_longnet.sequence.agreement import check_same_batch, fault_of
from lightning_longnet.sequence.batches import (
    check_labels,
    checked_dims,
    digest,
    dim_of,
    has_no_sequence,
    known_dim,
    known_length,
    length_of,
    map_tensors,
    named_tensors,
)
from lightning_longnet.sequence.parts import SequencePart, part_of
from lightning_longnet.sequence.shards import BatchShards

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from lightning_longnet.attention.parallel.shard import SequenceShard
    from lightning_longnet.sequence.position import MeshPosition

    PlacementRule = Callable[[int, int], Kind]  # of the number of tokens and the number of ranks


@dataclass
class CurrentBatch:
    """The sequences that layers work on now.

    Attributes:
        length: the number N of tokens of each whole sequence; None if it is unknown, and layers get no parts.
        is_whole: True inside `whole()`: layers get whole sequences, even those that a model makes itself.
        documents: the document ids of this rank's tokens, (L,) or (B, L); None if the batch has none.
        key_padding_mask: (B, L), True where a token of this rank is padding; None if the batch has no attention_mask.
        shard: the shard with these documents and this padding, once it was made.
        shards: the shards that were made for the masks that layers are given.
        is_begun: False until the first batch is begun or split, as then nobody knows the masks of the batch.
    """

    length: int | None = None
    is_whole: bool = False
    documents: Tensor | None = None
    key_padding_mask: Tensor | None = None
    shard: SequenceShard | None = None
    shards: BatchShards = field(default_factory=BatchShards)
    is_begun: bool = True


class BatchSplitter:
    """Splits batches over the ranks that share sequences, and keeps what is known of the current batch.

    `SequenceContext` has one, and its methods of the same names call it.

    Args:
        position: the position of this rank.
        placement: "contiguous" or "zigzag"; see `Placement`.  Or the function that chooses one of them.

    Attributes:
        current: the sequences that layers work on now.
        number: how many times `split` was called.
        samples: the names of the samples of a `SequencePart`; empty for other batches.
        repeated: how many of the batch's last samples another data-parallel group has as well, and counts.
    """

    def __init__(self, position: MeshPosition, placement: Kind | PlacementRule) -> None:
        self.position, self.placement = position, placement
        self.current = CurrentBatch(is_begun=False)
        self.number = 0
        self.samples: tuple[str, ...] = ()
        self.repeated = 0

    @property
    def is_split(self) -> bool:
        """Whether layers get parts of sequences now."""
        return self.current.length is not None and self.position.sequence_parallel_size > 1

    def split(self, batch: Any, sequence_dims: Mapping[str, int | None] | None = None) -> Any:
        """Return this rank's part of a batch that all ranks of the sequence group hold whole, and begin the batch.

        `SequenceContext.split` calls it, and describes the arguments.  Layers then work on parts of its length.
        """
        dims = checked_dims(sequence_dims or {})
        self.samples, self.repeated = (), 0
        self.number += 1
        if isinstance(batch, SequencePart):
            self._check_part(batch, dims)
            self.begin(batch.length)
            self.samples = batch.samples
            self._keep_masks(batch.tensors)
            return dict(batch.tensors)
        if self.position.sequence_parallel_size == 1:
            self.begin(known_length(batch, dims))
            known: dict[str, Tensor] = {}
            for path, x in named_tensors(batch):
                if known_dim(path, x, dims) is not None:
                    known.setdefault(path[-1], x)
            self._keep_masks(known)
            return batch
        length = self._length_of(batch, dims)
        self.begin(length)
        if length is None:
            return batch
        placement = self.placement_of(length)
        parts: dict[str, Tensor] = {}

        def part(path: tuple[str, ...], x: Tensor) -> Tensor:
            """Return this rank's tokens of a tensor, and keep them in `parts`; x itself where it has no sequence."""
            dim = dim_of(path, x, dims)
            if dim is None:
                return x
            result = part_of(x, placement, self.position.sequence_parallel_rank, dim)
            parts.setdefault(path[-1], result)
            return result

        batch = map_tensors(batch, part)
        self._keep_masks(parts)
        return batch

    def _keep_masks(self, parts: Mapping[str, Tensor]) -> None:
        """Keep copies of "documents" and "attention_mask" of this rank's tokens, for `SequenceContext.shard`.

        A later change of the batch's tensors in place then does not change the shard.

        Args:
            parts: the tensors of this rank by the last name of their paths.
        """
        documents, mask = parts.get("documents"), parts.get("attention_mask")
        self.current.documents = None if documents is None else documents.clone()
        self.current.key_padding_mask = None if mask is None else mask == 0

    def begin(self, length: int | None) -> None:
        """Begin a batch of sequences of `length` tokens, or of whole sequences where it is None, without masks."""
        self.current = CurrentBatch(length, self.current.is_whole)

    def begin_sequences(self, length: int) -> Tensor:
        """Begin a batch of sequences that the model itself makes, and return the positions of this rank's tokens, (L,).

        Inside `parts_of(None)`, which `SequenceContext.whole` enters, no batch begins, and all positions are returned.
        """
        if self.current.is_whole:
            return torch.arange(length)
        self._check_length(length)
        self.begin(length)
        return _positions(self.placement_of(length), self.position.sequence_parallel_rank)

    @contextmanager
    def parts_of(self, length: int | None) -> Iterator[None]:
        """Give layers parts of sequences of `length` tokens inside the block, and restore the batch after it.

        None gives them whole sequences.
        """
        before = self.current
        self.current = CurrentBatch(length, is_whole=length is None)
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def with_documents(self, documents: Tensor | None) -> Iterator[None]:
        """Let the batch have these documents, (N,) or (B, N), inside the block; a split batch keeps its own."""
        before = self.current
        if not self.is_split:
            self.current = replace(before, documents=documents, shard=None, shards=BatchShards())
        try:
            yield
        finally:
            self.current = before

    def check_same(self, batch: Any, sequence_dims: Mapping[str, int | None] | None = None) -> None:
        """Raise a ValueError on all ranks if ranks that share sequences hold unequal batches or one cannot be split.

        All ranks call it together; see `SequenceContext.check_same`.
        """
        position = self.position
        if position.sequence_group is None or position.data_parallel_group is None:
            return
        fault = self.fault_of(batch, sequence_dims)
        data_position = position.data_parallel_rank, position.data_parallel_size
        check_same_batch(digest(batch), fault, position.sequence_group, position.data_parallel_group, data_position)

    def fault_of(self, batch: Any, sequence_dims: Mapping[str, int | None] | None = None) -> str:
        """Return the error message for a batch that cannot be split; "" if it can be, or need not be.

        It sends nothing.
        """
        dims = checked_dims(sequence_dims or {})
        if isinstance(batch, SequencePart):
            return fault_of(lambda: self._check_part(batch, dims))
        if self.position.sequence_parallel_size > 1:
            return fault_of(lambda: (self._length_of(batch, dims), map_tensors(batch, lambda _, x: x)))
        return ""

    def _check_part(self, part: SequencePart, dims: Mapping[str, int | None]) -> None:
        """Raise a ValueError if a `SequencePart` has not this rank's tokens, or its tensors not as many tokens."""
        self._check_length(part.length)
        part.check_stretches(self.placement_of(part.length), self.position.sequence_parallel_rank)
        if (tokens := length_of(part.tensors, dims)) != part.tokens:
            raise ValueError(f"a SequencePart of {part.tokens} tokens must have as many in its tensors, got {tokens}")

    def _length_of(self, batch: Any, dims: Mapping[str, int | None]) -> int | None:
        """Return the number N of tokens of a batch's sequences; None if it has none, and is not to be split.

        A ValueError is raised if a tensor is not known, the tensors differ, or ranks would be without tokens.
        """
        if has_no_sequence(batch, dims):
            return None
        length = length_of(batch, dims)
        check_labels(batch, dims)
        self._check_length(length)
        return length

    def _check_length(self, length: int) -> None:
        """Raise a ValueError if sequences have fewer tokens than ranks share them."""
        size = self.position.sequence_parallel_size
        if length < size:
            raise ValueError(
                f"sequences must have at least one token for each of the {size} ranks that "
                f"share them, got {length}: set sequence_parallel_size to at most {length}, or pad them"
            )

    def placement_of(self, length: int) -> Placement:
        """Return the placement of sequences of `length` tokens that gives ranks equally many, or some one more.

        Splits go by it, `gather_sequence`, and `SequenceContext.placement_of`.
        """
        return Placement.even(length, self.position.sequence_parallel_size, self.kind_of(length))

    def kind_of(self, length: int) -> Kind:
        """Return "contiguous" or "zigzag" for sequences of `length` tokens: `placement`, or what that function returns.

        A function is not called where ranks share no sequences; the kind is then "contiguous".  `placement_of` and
        `ShardCache.make` call it, so that splits and shards agree, and `SequenceContext.kind_of` for the split check.
        """
        ranks, given = self.position.sequence_parallel_size, self.placement
        if not callable(given):
            return given
        return given(length, ranks) if ranks > 1 else "contiguous"

    @property
    def local_length(self) -> int:
        """The number L of tokens of each sequence on this rank; the length of the sequences must be known.

        `check_tokens`, attention, dropout and `ShardCache.make` read it in a split batch.
        """
        assert self.current.length is not None
        return self.placement_of(self.current.length).lengths[self.position.sequence_parallel_rank]

    @property
    def positions(self) -> Tensor | None:
        """The positions of this rank's tokens in the whole sequence, (L,); None if the length is unknown."""
        if self.current.length is None:
            return None
        return _positions(self.placement_of(self.current.length), self.position.sequence_parallel_rank)

    def positions_of(self, x: Tensor, dim: int) -> Tensor:
        """Return the positions in the whole sequence of the tokens along dimension `dim` of x, on the device of x.

        A ValueError is raised if that dimension does not have this rank's tokens.
        """
        if not self.is_split:
            return torch.arange(x.shape[dim], device=x.device)
        positions = self.positions
        assert positions is not None
        self.check_tokens(x.shape[dim])
        return positions.to(x.device)

    def check_tokens(self, tokens: int) -> None:
        """Raise a ValueError if `tokens`, which a layer was given, is not the number that this rank holds.

        `ContextAttention` calls it before attention in a split batch, `gather_sequence` and `positions_of`.
        """
        here = self.local_length
        if tokens != here:
            raise ValueError(
                f"this rank holds {here} tokens of each sequence of {self.current.length}, got {tokens}: layers are "
                f"given parts while a batch is worked on; for whole sequences, "
                f"`with sequence_context(module).whole():`"
            )


@lru_cache(16)
def _positions(placement: Placement, rank: int) -> Tensor:
    """Return the positions of a rank's tokens in the order in which it holds them, (L,); callers do not change it."""
    # a later call may train, and need not be under the modes of this one
    with _disable_current_modes(), torch.inference_mode(False):
        parts = [torch.arange(begin, end, device="cpu") for begin, end, _ in placement.chunks(rank)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long, device="cpu")
