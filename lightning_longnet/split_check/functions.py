"""Hooks and functions that a module keeps as attributes: in a copy of the module they must work on the copy."""

from __future__ import annotations

import copy
from types import CellType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from torch import nn


def rebind(module: nn.Module, memo: dict[int, Any]) -> None:
    """Replace the hooks and functions that a copied module keeps by ones that use copies of what theirs enclose.

    `copy.deepcopy` does not copy functions, and so a hook that encloses a module would change the original.  `_copied`
    of replica.py calls it after it has copied a module.

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
    """Replace the functions and weak references among the values of a dictionary; see `_rebound`."""
    for name, value in values.items():
        if isinstance(value, FunctionType):
            values[name] = _rebound(value, memo, done)
        elif isinstance(value, ReferenceType) and id(value()) in memo:
            values[name] = ReferenceType(memo[id(value())])


def _rebound(function: FunctionType, memo: dict[int, Any], done: dict[int, Any]) -> Any:
    """Return a function with copies in its closure, or itself if nothing in it was copied.

    Args:
        function: the function.
        memo: the copies by the ids of their originals.
        done: the functions that were replaced already, by the ids of their originals; the result is added.
    """
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
    """Return a cell of a closure with the copy of its content, or itself if that was not copied."""
    try:
        content = cell.cell_contents
    except ValueError:  # it is empty yet
        return cell
    copied = _copy_of(content, memo, done)
    return cell if copied is content else CellType(copied)


def _copy_of(value: Any, memo: dict[int, Any], done: dict[int, Any]) -> Any:
    """Return what stands for an enclosed value in the copy of a module, or the value itself."""
    if isinstance(value, FunctionType):
        return _rebound(value, memo, done)
    if isinstance(value, MethodType) and id(value.__self__) in memo:
        return copy.deepcopy(value, memo)
    return memo.get(id(value), value)
