"""Traversal of batches of any shape: their tensors, and which dimension of each is the sequence."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_longnet.sequence.parts import SequencePart

# The dimension that is the sequence, of tensors whose name the module does not declare
KNOWN_DIMS: Mapping[str, int | None] = {
    "input_ids": 1,
    "labels": 1,
    "attention_mask": 1,
    "positions": -1,
    "documents": -1,
    "shift_labels": 1,  # transformers' names of labels and positions
    "position_ids": -1,
}
LABELS = "labels"  # the one of these names that is usual for samples, too
ROOT = "batch"  # the name of the whole, and so of a batch that is one tensor

Path = tuple[str, ...]


class _Container(NamedTuple):
    """A dictionary, list, tuple or dataclass inside a batch.

    Attributes:
        values: its values by their keys, indices or field names as text.
        remake: makes a container of the same type and keys of other values.
    """

    values: dict[str, Any]
    remake: Callable[[dict[str, Any]], Any]


def map_tensors(batch: Any, function: Callable[[Path, Tensor], Any], path: Path = (ROOT,)) -> Any:
    """Return a copy of a batch with `function(path, tensor)` in the place of each tensor.

    `BatchSplitter.split` cuts a batch with it, and the split check its samples; `BatchSplitter.fault_of` tries whether
    it can.  What is neither a tensor nor a container stays the same object; an object of another class that has tensors
    as attributes raises a ValueError.

    Args:
        batch: a tensor, or tensors in dictionaries, lists, tuples and dataclasses, nested in any way.
        function: is called with the path and the tensor.
        path: the path of `batch` itself, in recursive calls: ("batch", "a", "0") is `batch["a"][0]`.
    """
    if isinstance(batch, Tensor):
        return function(path, batch)
    _check_not_nested(path, batch)
    container = _as_container(batch)
    if container is not None:
        parts = {name: map_tensors(value, function, (*path, name)) for name, value in container.values.items()}
        return container.remake(parts)
    if any(isinstance(value, Tensor) for value in getattr(batch, "__dict__", {}).values()):
        raise ValueError(
            f"{_dotted(path)} is a {type(batch).__name__}, which cannot be split over ranks: a batch may hold tensors "
            f"in dictionaries, lists, tuples and dataclasses"
        )
    return batch


def named_tensors(batch: Any, path: Path = (ROOT,)) -> Iterator[tuple[Path, Tensor]]:
    """Yield (path, tensor) for each tensor of a batch, with the paths and in the order of `map_tensors`.

    Splits, comparisons of batches over ranks, the split check, `ChangeWatch` and callbacks go through a batch with it.
    """
    if isinstance(batch, Tensor):
        yield path, batch
        return
    _check_not_nested(path, batch)
    container = _as_container(batch)
    for name, value in container.values.items() if container is not None else ():
        yield from named_tensors(value, (*path, name))


def _check_not_nested(path: Path, batch: Any) -> None:
    """Raise a ValueError if a `SequencePart` is inside a batch: it can only be the whole batch."""
    if isinstance(batch, SequencePart) and len(path) > 1:
        raise ValueError(f"{_dotted(path)} is a SequencePart, which must be the whole batch, got it inside of another")


def _as_container(batch: Any) -> _Container | None:
    """Return the values of a dictionary, list, tuple or dataclass, and how to make it again; None for other objects.

    A `SequencePart` is a dataclass, whose `tensors` are one of its values.
    """
    if isinstance(batch, Mapping):
        return _Container({str(key): value for key, value in batch.items()}, lambda parts: _with_items(batch, parts))
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return _Container(dict(zip(batch._fields, batch, strict=True)), lambda parts: type(batch)(**parts))
    if isinstance(batch, (list, tuple)):
        return _Container({str(i): value for i, value in enumerate(batch)}, lambda parts: type(batch)(parts.values()))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        return _Container(fields, lambda parts: _with_fields(batch, parts))
    return None


def _with_items(batch: Any, parts: dict[str, Any]) -> Any:
    """Return a copy of a mapping with other values; the copy keeps its class, as transformers' `BatchEncoding`."""
    result = copy.copy(batch)
    for key in batch:
        result[key] = parts[str(key)]
    return result


def _with_fields(batch: Any, parts: dict[str, Any]) -> Any:
    """Return a copy of a dataclass with other values of its fields, without calling its `__init__`."""
    result = copy.copy(batch)
    for name, value in parts.items():
        object.__setattr__(result, name, value)  # a frozen dataclass refuses setattr
    return result


def dim_of(path: Path, x: Tensor, dims: Mapping[str, int | None]) -> int | None:
    """Return the dimension of a tensor that is the sequence, counted from 0, or None if it has none.

    A ValueError is raised if neither `dims` nor `KNOWN_DIMS` has the tensor, or if it has fewer dimensions than that.
    `BatchSplitter.split` calls it for each tensor, the split check where it cuts a sample, and `length_of` and
    `has_no_sequence`.

    Args:
        path: the path of the tensor in its batch, as `named_tensors` yields it.
        x: the tensor; one without dimensions has no sequence.
        dims: the module's `sequence_dims`, which override `KNOWN_DIMS`; see `_find_dim`.
    """
    if x.dim() == 0:
        return None
    is_known, dim = _find_dim(path, x, dims)
    if not is_known:
        raise ValueError(_of_unknown([(path, x)]))
    if dim is None:
        return None
    if not -x.dim() <= dim < x.dim():
        raise ValueError(
            f"{_dotted(path)} is to be split along dimension {dim}, and has shape {tuple(x.shape)}: say in the module "
            f"which one is the sequence, sequence_dims = {{{path[-1]!r}: ...}}, or None where it has none"
        )
    return dim % x.dim()


def _check_known(batch: Any, dims: Mapping[str, int | None]) -> None:
    """Raise a ValueError that names all tensors of a batch whose dimension is neither declared nor known."""
    unknown = [(path, x) for path, x in named_tensors(batch) if x.dim() > 0 and not _find_dim(path, x, dims)[0]]
    if unknown:
        raise ValueError(_of_unknown(unknown))


def _of_unknown(unknown: list[tuple[Path, Tensor]]) -> str:
    """Return the message of an error about tensors whose dimension is neither declared nor known."""
    shown = ", ".join(f"{_dotted(path)} of shape {tuple(x.shape)}" for path, x in unknown)
    kind, whose, they = (
        ("is a tensor", "its dimensions", "it has")
        if len(unknown) == 1
        else ("are tensors", "their dimensions", "they have")
    )
    declared = {path[-1]: 1 if x.dim() > 1 else None for path, x in unknown}
    return (
        f"{shown} {kind} that nothing is known of: say in the module which of {whose} is the sequence, "
        f"sequence_dims = {declared}, or None where {they} none"
    )


def known_dim(path: Path, x: Tensor, dims: Mapping[str, int | None]) -> int | None:
    """Return the same as `dim_of`, but None where that raises a ValueError.

    It is for whole sequences, which need not be split, so that a batch of any tensors is allowed: `BatchSplitter.split`
    asks where each rank has whole sequences, `size_of` of the callbacks, and `check_labels`.
    """
    _, dim = _find_dim(path, x, dims)
    return dim % x.dim() if dim is not None and -x.dim() <= dim < x.dim() else None


def _find_dim(path: Path, x: Tensor, dims: Mapping[str, int | None]) -> tuple[bool, int | None]:
    """Return (is it declared, value) for the sequence dimension of a tensor, as `dims` or `KNOWN_DIMS` declare it.

    The value may be negative, or None for a tensor without a sequence.  `dims` has precedence.  It is searched for the
    whole path, as in "a.b.c", and then for each name on the path, the last one first.  `KNOWN_DIMS` is searched for the
    last name, or the name of the list that holds the tensor.
    """
    for name in (".".join(path[1:]), *reversed(path)):
        if name in dims:
            return True, dims[name]
    name = _leaf_name(path)
    if name in KNOWN_DIMS and (x.dim() <= 2 or name in ("input_ids", "labels", "shift_labels")):
        return True, KNOWN_DIMS[name]
    return False, None


def length_of(batch: Any, dims: Mapping[str, int | None]) -> int:
    """Return the number of tokens N that all sequences of a batch have.

    A ValueError is raised if they have different numbers, if no tensor is a sequence, or if one is not known.
    `BatchSplitter._length_of` calls it on a whole batch, `BatchSplitter._check_part` on the tensors of a
    `SequencePart`, and the split check on its samples.

    Args:
        batch: tensors in dictionaries, lists, tuples and dataclasses.
        dims: the `sequence_dims` of the module: for a name the dimension that is the sequence, or None.
    """
    _check_known(batch, dims)
    lengths = {}
    for path, x in named_tensors(batch):
        dim = dim_of(path, x, dims)
        if dim is not None:
            lengths[_dotted(path)] = x.shape[dim]
    if not lengths:
        raise ValueError("the batch has no tensor with a sequence: nothing can be split over ranks")
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
        hint = ""
        if any(_leaf_name(path) == LABELS and _is_guessed(path, dims) for path, _ in named_tensors(batch)):
            hint = f"; where labels are of samples, say so in the module, sequence_dims = {{{LABELS!r}: None}}"
        raise ValueError(f"all sequences of a batch must have the same number of tokens, got {shown}{hint}")
    return next(iter(lengths.values()))


def check_labels(batch: Any, dims: Mapping[str, int | None]) -> None:
    """Raise a ValueError if "labels" may be labels of samples, (B, C), although their name has them split as (B, N).

    `BatchSplitter` calls it before it splits a batch.  Labels that the module declares in `dims` raise nothing.  Others
    are taken for labels of tokens if the batch has `input_ids`, (B, N), or if the module declares no other sequence.
    Even then (B, N) of floats or booleans are refused: they may be those of C classes, where C happens to be N.
    """
    leaves = list(named_tensors(batch))
    beside_ids = any(_leaf_name(path) == "input_ids" and known_dim(path, x, dims) == 1 for path, x in leaves)
    is_declared = any(not _is_guessed(path, dims) and known_dim(path, x, dims) is not None for path, x in leaves)
    for path, x in leaves:
        if _leaf_name(path) != LABELS or not _is_guessed(path, dims) or x.dim() < 2:
            continue
        are_numbers = x.dim() == 2 and (x.is_floating_point() or x.dtype == torch.bool)
        if are_numbers or (is_declared and not beside_ids):
            name = _dotted(path)
            raise ValueError(
                f"{name} of shape {tuple(x.shape)} and {x.dtype} may be of the tokens or of the samples: say in the "
                f"module which, sequence_dims = {{{LABELS!r}: 1}} where dimension 1 is the sequence, or "
                f"{{{LABELS!r}: None}} where labels have none"
            )


def _is_guessed(path: Path, dims: Mapping[str, int | None]) -> bool:
    """Return whether `dims` has no entry for a tensor, so that its dimension comes from `KNOWN_DIMS` if at all."""
    return not any(name in dims for name in (".".join(path[1:]), *path))


def has_no_sequence(batch: Any, dims: Mapping[str, int | None]) -> bool:
    """Return whether all tensors of a batch are declared to have no sequence, so that it is not split.

    A model makes the sequences itself of such a batch, as of images.  A batch without tensors gives False, so that
    `length_of` raises an error for it.  `BatchSplitter._length_of` asks before a split, and `batch_length` of the split
    check.
    """
    _check_known(batch, dims)
    declared = [dim_of(path, x, dims) for path, x in named_tensors(batch) if x.dim() > 0]
    return bool(declared) and not any(dim is not None for dim in declared)


def known_length(batch: Any, dims: Mapping[str, int | None]) -> int | None:
    """Return the number of tokens of a batch's sequences, or None if no tensor is known to be one or they differ.

    It is for whole sequences, where `length_of` would raise errors for batches that are allowed.  `BatchSplitter.split`
    calls it where each rank has whole sequences.
    """
    known = [(x, known_dim(path, x, dims)) for path, x in named_tensors(batch)]
    lengths = {x.shape[dim] for x, dim in known if dim is not None}
    return lengths.pop() if len(lengths) == 1 else None


def digest(batch: Any) -> int:
    """Return a 56-bit hash of the paths, shapes, dtypes and values of a batch's tensors.

    `BatchSplitter.check_same` compares it between ranks that share sequences, and `NonFiniteGuard` names batches by it.
    Of a `SequencePart` it is a hash of the samples' names, as the values on each rank are those of other tokens.  It
    copies the tensors to the CPU.
    """
    if isinstance(batch, SequencePart):
        return batch.digest()
    content = sha256()
    for path, x in named_tensors(batch):
        content.update(f"{path} {tuple(x.shape)} {x.dtype}".encode())
        content.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(content.digest()[:7], "big")


def checked_dims(dims: Any) -> dict[str, int | None]:
    """Return a copy of a module's `sequence_dims` with text as keys, for the other functions of this file.

    `BatchSplitter`, `SplitSteps.batch_to_device`, `LoaderWatch`, `check_split` and `size_of` of the callbacks call it
    before they use them.  Indices of lists may be integers there.  A ValueError is raised if it is no mapping to
    dimensions or None.
    """
    if not isinstance(dims, Mapping) or not all(
        isinstance(name, (str, int)) and (dim is None or (isinstance(dim, int) and not isinstance(dim, bool)))
        for name, dim in dims.items()
    ):
        raise ValueError(f"sequence_dims must map names to dimensions, or to None, got {dims!r}")
    return {str(name): dim for name, dim in dims.items()}


def _leaf_name(path: Path) -> str:
    """Return the last name on a path that is no index of a list: ("batch", "labels", "0") gives "labels"."""
    return next((word for word in reversed(path) if not word.isdigit()), ROOT)


def _dotted(path: Path) -> str:
    """Return a path as error messages show it: "labels.0", or "batch" for a batch that is one tensor."""
    return ".".join(path[1:]) or ROOT
