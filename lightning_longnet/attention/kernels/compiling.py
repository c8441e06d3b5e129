"""Marks of functions for `torch.compile`, which do not import the compiler where nothing is compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, ParamSpec, TypeVar

from torch._compile import _disable_dynamo

if TYPE_CHECKING:
    from collections.abc import Callable

_P = ParamSpec("_P")
_T = TypeVar("_T")


def not_compiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return a function that a compiled graph breaks at, as with `torch.compiler.disable`, which imports the compiler.

    torch's own modules mark their functions in this way: the compiler is imported at the first call.
    """
    marked: Callable[_P, _T] = _disable_dynamo(function)
    return marked


def constant_result(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return a function whose result a compiled graph takes as a constant, as `torch.compiler.assume_constant_result`.

    That sets this attribute alone, but imports the compiler, which takes longer than all of this package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
