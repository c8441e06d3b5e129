"""Functions that a module keeps: in a copy of the module they must work on the copy."""

from __future__ import annotations

import copy
from types import CellType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from torch import nn


def rebind(module: nn.Module, memo: dict[int, Any]) -> None:
    """Let hooks and functions that a copied module keeps use the copies of what their originals enclose.

    `copy.deepcopy` takes functions as they are, and so a hook that encloses a module would change the original.

    Args:
        module: the copy.
        memo: the copies by the ids of their originals, as `copy.deepcopy` leaves them.
    """
    done: dict[int, Any] = {}
    for each in module.modules():
        _rebind_values(each.__dict__, memo, done)
        for value in each.__dict__.values():
            if isinstance(value, dict):
                _rebind_values(value, memo, done)


def _rebind_values(values: MutableMapping[Any, Any], memo: dict[int, Any], done: dict[int, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, FunctionType):
            values[name] = _rebound(value, memo, done)
        elif isinstance(value, ReferenceType) and id(value()) in memo:
            values[name] = ReferenceType(memo[id(value())])


def _rebound(function: FunctionType, memo: dict[int, Any], done: dict[int, Any]) -> Any:
    """Return a function with copies in its closure, or itself where nothing in it was copied."""
    compiled = getattr(function, "_torchdynamo_orig_callable", None)
    if compiled is not None:  # of which the copy runs the original, without the compiler
        return _copy_of(compiled, memo, done)
    if id(function) in done:
        return done[id(function)]
    done[id(function)] = function  # a function may enclose itself
    cells = [_cell(cell, memo, done) for cell in function.__closure__ or ()]
    if any(new is not old for new, old in zip(cells, function.__closure__ or (), strict=True)):
        result = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
        )
        result.__kwdefaults__ = function.__kwdefaults__
        result.__dict__.update(function.__dict__)
        done[id(function)] = result
    return done[id(function)]


def _cell(cell: CellType, memo: dict[int, Any], done: dict[int, Any]) -> CellType:
    try:
        content = cell.cell_contents
    except ValueError:  # it is empty yet
        return cell
    copied = _copy_of(content, memo, done)
    return cell if copied is content else CellType(copied)


def _copy_of(value: Any, memo: dict[int, Any], done: dict[int, Any]) -> Any:
    if isinstance(value, FunctionType):
        return _rebound(value, memo, done)
    if isinstance(value, MethodType) and id(value.__self__) in memo:
        return copy.deepcopy(value, memo)
    return memo.get(id(value), value)
