"""Marks of functions for `torch.compile`, and operators, which do not import the compiler where nothing is compiled."""

from __future__ import annotations

import sys
from functools import wraps
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# autograd's bookkeeping of views, which takes a part of the time of each operator
VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
_P = ParamSpec("_P")
_T = TypeVar("_T")


def constant_result(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return a function whose result a compiled graph takes as a constant, as `torch.compiler.assume_constant_result`.

    That sets this attribute alone, but imports the compiler, which takes longer than all of this package.  Kernels,
    `_capability` of prepared.py and LongViT mark with it what they ask of the machine or make once, such as whether a
    package is installed.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_result
def _is_compiler_loaded() -> bool:
    """Return whether something has imported torch's compiler."""
    return "torch._dynamo" in sys.modules


def not_compiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return a function that a compiled graph breaks at, as with `torch.compiler.disable`, which imports the compiler.

    Before something else has imported the compiler, nothing is compiled, and the function is called as it is.  Calls
    over ranks, the preflight of a `Guard` and the bodies of operators are marked so.  So are methods of
    `ContextAttention` and of the dropout of a `SequenceContext`.
    """
    marked: Callable[_P, _T] = _disable_dynamo(function)  # as torch's own modules mark theirs

    @wraps(function)
    def uncompiled(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call the function, outside of a graph if something may be compiled."""
        return marked(*args, **kwargs) if _is_compiler_loaded() else function(*args, **kwargs)

    return uncompiled


class Operator(Generic[_P, _T]):
    """An operator of torch, as `torch.library.custom_op` makes one that mutates no argument.

    The first call of one of those imports the compiler, which takes as long as torch itself.  The decorator `operator`
    makes one.

    Args:
        name: the name, "namespace::operator".
        body: the function that computes it on all devices; its annotations give the schema.
    """

    def __init__(self, name: str, body: Callable[_P, _T]) -> None:
        self.name, self.body = name, body
        schema = torch.library.infer_schema(body, mutates_args=())
        torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)

        def computed(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            """Call the body without autograd's bookkeeping of views, as nothing in it is differentiated."""
            with torch._C._ExcludeDispatchKeyGuard(VIEWS):
                return body(*args, **kwargs)

        torch.library.impl(name, "default", not_compiled(computed))
        namespace, _, operator = name.partition("::")
        self._call = getattr(getattr(torch.ops, namespace), operator).default

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call the operator through torch's dispatcher."""
        result: _T = self._call(*args, **kwargs)
        return result

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None) -> None:
        """Register the function that returns the gradients, and the one that saves what it reads; op.py calls it.

        If the last result is a list, it is flattened here: torch's own function flattens all arguments and results as
        trees, which takes as long as the body of the operator.  A call of which forward mode wants the derivative is
        refused, as torch would drop the tangents.
        """
        call, below, save = self._call, torch._C._after_autograd_keyset, setup_context
        returns = call._schema.returns
        count = len(returns) - 1 if returns[-1].type.kind() == "ListType" else None
        namespace, _, operator = self.name.partition("::")

        class Gradient(torch.autograd.Function):
            """The operator with its gradient, without the list around its last results."""

            @staticmethod
            def forward(ctx: Any, keys: Any, *args: Any) -> tuple[Tensor, ...]:
                """Compute the operator, and save what the backward reads."""
                with torch._C._AutoDispatchBelowAutograd():
                    results = call.redispatch(keys & below, *args)
                    if save is not None:
                        save(ctx, args, results)
                return tuple(results) if count is None else (*results[:count], *results[count])

            @staticmethod
            def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
                """Return no gradient for the keys, and those of the arguments."""
                return None, *backward(ctx, *gradients)

        def differentiable(keys: Any, *args: Any) -> Any:
            """Compute the operator, with its gradient if an argument requires one."""
            if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
                raise NotImplementedError(f"{operator} has no derivative in forward mode; kernel='reference' has")
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
                results = Gradient.apply(keys, *args)  # type: ignore[no-untyped-call]
                return results if count is None else (*results[:count], list(results[count:]))
            with torch._C._AutoDispatchBelowAutograd():
                return call.redispatch(keys & below, *args)

        self._library = torch.library.Library(namespace, "FRAGMENT")  # its registrations end with it
        self._library.impl(operator, differentiable, "Autograd", with_keyset=True)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register a function that returns results without data, for fake tensors, and return it; op.py calls it."""
        torch.library.register_fake(self.name, function)
        return function


def _has_tangent(argument: Any) -> bool:
    """Return whether an argument of an operator is, or holds, a tensor of which forward mode computes a derivative."""
    if isinstance(argument, list):
        return any(map(_has_tangent, argument))
    return isinstance(argument, torch.Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def operator(name: str) -> Callable[[Callable[_P, _T]], Operator[_P, _T]]:
    """Return a decorator that makes a function the body of an operator.

    `attend` and `attend_backward` of op.py are made so.
    """
    return lambda body: Operator(name, body)
