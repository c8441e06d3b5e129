"""What the ranks of a shard compare when they make it: the arguments of each, as integers."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch

from lightning_longnet.attention.parallel.placement import Kind, Placement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_longnet.attention.parallel.comm import Comm

Check = Literal["first", "always"]
_KINDS: tuple[Kind, ...] = ("contiguous", "zigzag")


class ShardHeader(NamedTuple):
    """The integers that ranks compare or exchange when they make a shard.

    `SequenceShard` makes that of its rank and gathers those of all.  The numbers of rows are -1 without documents or
    padding.  A rank with a fault has the length 0 and the placement -1.
    """

    length: int
    placement: int
    document_rows: int
    padding_rows: int
    checks_always: int
    document_runs: int
    padding_runs: int
    threads: int
    number: int

    @classmethod
    def of(
        cls,
        length: int,
        placement: Kind | Placement,
        runs: Sequence[list[Tensor] | None],
        check: Check,
        number: int,
        fault: str,
    ) -> ShardHeader:
        """Return the header of this rank; `SequenceShard` makes it before ranks exchange anything.

        Args:
            length: its tokens of each sequence.
            placement: the placement that it was given.
            runs: for documents and padding, the runs of each row, or None.
            check: when calls are compared.
            number: the number of its shard.
            fault: what is wrong with its arguments, or an empty text.
        """
        document_rows, padding_rows = (-1 if x is None else len(x) for x in runs)
        document_runs, padding_runs = (0 if x is None else max(map(len, x), default=0) for x in runs)
        return cls(
            0 if fault else length,
            -1 if fault else _number_of(placement),
            document_rows,
            padding_rows,
            int(check == "always"),
            document_runs,
            padding_runs,
            torch.get_num_threads(),
            number,
        )


def check_headers(headers: Sequence[ShardHeader], fault: str) -> None:
    """Raise a ValueError for this rank's own `fault`, or where ranks gave different values for one argument.

    `SequenceShard` calls it with the headers of all ranks when it is made, so that all of them raise the error.
    """
    if fault:
        raise ValueError(fault)
    # the arguments that must be equal, with the words for their numbers; other arguments have numbers of rows
    names: tuple[tuple[str, Sequence[Any]], ...] = (
        ("placement", (*_KINDS, "a Placement")),
        ("rows of documents", ()),
        ("rows of key_padding_mask", ()),
        ("check", get_args(Check)),
    )
    for i, (name, labels) in enumerate(names, 1):  # the order of the fields of `ShardHeader`
        values = [h[i] for h in headers]
        if len(set(values)) > 1:
            # placements of `balanced_placement` have larger numbers than the last word
            words = [labels[min(v, len(labels) - 1)] if labels else "none" if v < 0 else v for v in values]
            other = next(r for r, value in enumerate(values) if value != values[0])
            raise ValueError(
                f"{name} must be equal on all ranks, got {words[0]} on rank 0 and {words[other]} on rank {other}"
            )


def _number_of(placement: Kind | Placement) -> int:
    """Return the number by which ranks compare a placement: that of its name, or a 56-bit hash of a `Placement`."""
    if not isinstance(placement, Placement):
        return _KINDS.index(placement)
    content = repr((placement.lengths, placement.kind, placement.listed)).encode()
    return len(_KINDS) + int.from_bytes(sha256(content).digest()[:7], "big")


def placement_fault(comm: Comm, length: Any, placement: Any) -> str:
    """Return why a placement of a batch does not fit this rank, or an empty text.

    Only a `Placement` object can fail here; a name is checked by `argument_fault`.  `SequenceShard` asks when it is
    made, before it asks `argument_fault`.
    """
    if not isinstance(placement, Placement):
        return ""
    if placement.ranks != comm.ranks:
        return f"placement must have {comm.ranks} ranks, as the group, got {placement.ranks}"
    if placement.lengths[comm.rank] != length:
        return f"length must be that of the placement on rank {comm.rank} of {placement.lengths}, got {length}"
    return ""


def argument_fault(rank: int, length: Any, placement: Any, documents: Any, padding: Any, check: Any) -> str:
    """Return what is wrong with the arguments that this rank gave to `SequenceShard`, or an empty text.

    `SequenceShard` calls it when it is made.  The ranks exchange headers before one of them raises the error, so that
    no rank waits for it.
    """
    if not isinstance(length, int) or isinstance(length, bool) or length < 0:
        return f"length must be a number of tokens, at least 0, got {length!r} on rank {rank}"
    for name, value, allowed in (("placement", placement, _KINDS), ("check", check, get_args(Check))):
        if not isinstance(value, Placement) and value not in allowed:
            return f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r} on rank {rank}"
    if documents is not None:
        if not isinstance(documents, torch.Tensor):
            return f"documents must be a tensor of integer ids, got {type(documents).__name__} on rank {rank}"
        if documents.dtype.is_floating_point or documents.dtype.is_complex or documents.dtype == torch.bool:
            return f"documents must be integer ids, got {documents.dtype} on rank {rank}"
        if documents.dim() not in (1, 2) or documents.shape[-1] != length:
            return f"documents must be ({length},) or (batch, {length}), got {tuple(documents.shape)} on rank {rank}"
    if padding is not None:
        expected = f"key_padding_mask must be bools of shape (batch, {length}), got"
        if not isinstance(padding, torch.Tensor):
            return f"{expected} {type(padding).__name__} on rank {rank}"
        if padding.dtype != torch.bool or padding.dim() != 2 or padding.shape[1] != length:
            return f"{expected} {padding.dtype} of shape {tuple(padding.shape)} on rank {rank}"
    return ""
