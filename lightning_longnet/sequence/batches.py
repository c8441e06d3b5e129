"""Batches of any shape, leaf by leaf: which dimension of each tensor is the sequence, and what each becomes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from lightning_longnet.sequence.parts import SequencePart

# Tensors of these names are split where the module says nothing else
KNOWN_DIMS: Mapping[str, int | None] = {
    "input_ids": 1,
    "labels": 1,
    "attention_mask": 1,
    "positions": -1,
    "documents": -1,
}
ROOT = "batch"  # the name of the whole, and so of a batch that is one tensor

Path = tuple[str, ...]


def mapped(batch: Any, function: Callable[[Path, Tensor], Any], path: Path = (ROOT,)) -> Any:
    """The same batch with each tensor replaced; a container is copied, what is no tensor stays as it is."""
    if isinstance(batch, Tensor):
        return function(path, batch)
    _refuse_inside(path, batch)
    parts = {name: mapped(value, function, (*path, name)) for name, value in _items(batch)}
    if isinstance(batch, Mapping):
        found: Any = copy.copy(batch)
        for key in batch:
            found[key] = parts[str(key)]
        return found
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(**parts)
    if isinstance(batch, (list, tuple)):
        return type(batch)(parts.values())
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        found = copy.copy(batch)
        for name, value in parts.items():
            object.__setattr__(found, name, value)
        return found
    if any(isinstance(value, Tensor) for value in getattr(batch, "__dict__", {}).values()):
        raise ValueError(
            f"{_shown(path)} is a {type(batch).__name__}, which cannot be split over ranks: a batch may hold tensors "
            f"in dictionaries, lists, tuples and dataclasses"
        )
    return batch


def tensors(batch: Any, path: Path = (ROOT,)) -> Iterator[tuple[Path, Tensor]]:
    """Those of a batch, in the order in which `mapped` comes by them."""
    if isinstance(batch, Tensor):
        yield path, batch
        return
    _refuse_inside(path, batch)
    for name, value in _items(batch):
        yield from tensors(value, (*path, name))


def _refuse_inside(path: Path, batch: Any) -> None:
    if isinstance(batch, SequencePart) and len(path) > 1:
        raise ValueError(f"{_shown(path)} is a SequencePart, which must be the whole batch, got it inside of another")


def _items(batch: Any) -> Iterator[tuple[str, Any]]:
    """What a container holds, by names; nothing where it is none."""
    if isinstance(batch, Mapping):
        yield from ((str(key), value) for key, value in batch.items())
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        yield from zip(batch._fields, batch, strict=True)
    elif isinstance(batch, (list, tuple)):
        yield from ((str(i), value) for i, value in enumerate(batch))
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        yield from ((field.name, getattr(batch, field.name)) for field in dataclasses.fields(batch))


def dim_of(path: Path, x: Tensor, dims: Mapping[str, int | None]) -> int | None:
    """The sequence's dimension, None for a tensor of no sequence; an error where nothing is said of it.

    What is declared goes first: a tensor's place in `a.b.c` whole, or a word of it, the last one before others.  What
    is known is the last word alone, or that of the list that the tensor is in.
    """
    if x.dim() == 0:
        return None
    for name in (".".join(path[1:]), *reversed(path)):
        if name in dims:
            return _checked_dim(path, x, dims[name])
    name = _last_word(path)
    if name in KNOWN_DIMS and (x.dim() <= 2 or name in ("input_ids", "labels")):
        return _checked_dim(path, x, KNOWN_DIMS[name])
    raise ValueError(
        f"{_shown(path)} of shape {tuple(x.shape)} is a tensor that nothing is known of: say in the module which of "
        f"its dimensions is the sequence, sequence_dims = {{{path[-1]!r}: 1}}, or None where it has none"
    )


def length_of(batch: Any, dims: Mapping[str, int | None]) -> int:
    """Tokens of the sequences of a batch, which all have as many."""
    lengths = {}
    for path, x in tensors(batch):
        dim = dim_of(path, x, dims)
        if dim is not None:
            lengths[_shown(path)] = x.shape[dim]
    if not lengths:
        raise ValueError("the batch has no tensor with a sequence: nothing can be split over ranks")
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"all sequences of a batch must have the same number of tokens, got {shown}")
    return next(iter(lengths.values()))


def is_whole(batch: Any, dims: Mapping[str, int | None]) -> bool:
    """Is it said of every tensor of a batch, and of one at least, that it has no sequence?"""
    found = [dim_of(path, x, dims) for path, x in tensors(batch) if x.dim() > 0]
    return bool(found) and not any(dim is not None for dim in found)


def known_length(batch: Any, dims: Mapping[str, int | None]) -> int | None:
    """As `length_of`, of what is declared or known alone; None where that is nothing, or differs."""
    lengths = set()
    for path, x in tensors(batch):
        for name in (".".join(path[1:]), *reversed(path), _last_word(path)):
            dim = dims.get(name, KNOWN_DIMS.get(name) if name == _last_word(path) else None)
            if dim is not None and -x.dim() <= dim < x.dim():
                lengths.add(x.shape[dim])
                break
    return lengths.pop() if len(lengths) == 1 else None


def digest(batch: Any) -> int:
    """A number that two batches share where they hold equal tensors, or parts of the same samples."""
    if isinstance(batch, SequencePart):
        return batch.digest()
    found = sha256()
    for path, x in tensors(batch):
        found.update(f"{path} {tuple(x.shape)} {x.dtype}".encode())
        found.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(found.digest()[:7], "big")


def checked_dims(dims: Any) -> dict[str, int | None]:
    """`sequence_dims` of a module, with names as text."""
    if not isinstance(dims, Mapping) or not all(
        isinstance(name, (str, int)) and (dim is None or (isinstance(dim, int) and not isinstance(dim, bool)))
        for name, dim in dims.items()
    ):
        raise ValueError(f"sequence_dims must map names to dimensions, or to None, got {dims!r}")
    return {str(name): dim for name, dim in dims.items()}


def _checked_dim(path: Path, x: Tensor, dim: int | None) -> int | None:
    if dim is None:
        return None
    if not -x.dim() <= dim < x.dim():
        raise ValueError(
            f"{_shown(path)} is to be split along dimension {dim}, and has shape {tuple(x.shape)}: say in the module "
            f"which one is the sequence, sequence_dims = {{{path[-1]!r}: ...}}, or None where it has none"
        )
    return dim % x.dim()


def _last_word(path: Path) -> str:
    return next((word for word in reversed(path) if not word.isdigit()), ROOT)


def _shown(path: Path) -> str:
    return ".".join(path[1:]) or ROOT
