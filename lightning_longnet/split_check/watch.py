"""A record of a step: the inputs and outputs of each module, and which functions across tokens it called itself."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_longnet.split_check.causes import cause_of_call

if TYPE_CHECKING:
    from collections.abc import Iterator

STEP = "the step itself"
_DRAWS = frozenset(("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli"))
_DRAWS |= {"multinomial", "normal", "uniform", "exponential", "random", "poisson", "gumbel_softmax"}


@dataclass
class Call:
    """One call of a module.

    Attributes:
        name: the name of the module.
        kind: its class.
        inputs: the tensors that it got, as they were before the call.
        outputs: the tensors that it returned.
    """

    name: str
    kind: type[nn.Module]
    inputs: list[Tensor]
    outputs: list[Tensor] = field(default_factory=list)


class Watch(TorchFunctionMode):
    """Records the modules that a step calls, and the functions across tokens that each of them calls itself.

    `Comparison` runs the step with a record of whole sequences and one of parts, to find where they begin to differ.

    Args:
        tokens: the number of tokens of each sequence in this run; None records no causes.

    Attributes:
        calls: the calls of modules, in the order in which they ended.
        causes: keys of `ADVICE` for the functions that a module called, by its name.
        draws: the calls that draw random numbers, with the numbers that they are given.
    """

    def __init__(self, tokens: int | None) -> None:
        super().__init__()
        self.tokens = tokens
        self.calls: list[Call] = []
        self.causes: dict[str, list[str]] = {}
        self.draws: list[Any] = []
        self._open: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, and record what it computes across tokens; torch calls this for each of them."""
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "").rstrip("_") in _DRAWS:
            self.draws.append((func.__name__, [x for x in tree_leaves((args, kwargs)) if isinstance(x, (int, float))]))
        if self.tokens is not None and not _is_called_by_package():
            cause = cause_of_call(func, args, kwargs or {}, result, self.tokens)
            if cause is not None:
                causes = self.causes.setdefault(self._open[-1].name if self._open else STEP, [])
                if cause not in causes:
                    causes.append(cause)
        return result

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Record what the modules inside of `module` do inside the block.

        `Comparison` gives it to `Runner.run` as `watch`, which enters it around the step.
        """
        handles = []
        for name, each in module.named_modules():
            if name:
                handles.append(each.register_forward_pre_hook(self._before(name), prepend=True, with_kwargs=True))
                handles.append(each.register_forward_hook(self._after(name), with_kwargs=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str) -> Any:
        """Return a forward pre-hook that opens the record of a call of the module `name`."""

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._open.append(Call(name, type(module), _copies((args, kwargs))))

        return hook

    def _after(self, name: str) -> Any:
        """Return a forward hook that ends the record of a call of the module `name`."""

        def hook(_module: nn.Module, _args: Any, _kwargs: Any, result: Any) -> None:
            # checkpoints end the calls of a recomputation by an error, and those have no result
            while (call := self._open.pop()).name != name:
                pass
            call.outputs = _copies(result)
            self.calls.append(call)

        return hook


def _is_called_by_package() -> bool:
    """Return whether this package called the function of torch, as in `positions_of`: that is no error of the module.

    The split check itself calls attention in the name of the module, to leave out its dropout.
    """
    caller = str(sys._getframe(2).f_globals.get("__name__", ""))
    return caller.startswith("lightning_longnet.") and not caller.startswith("lightning_longnet.split_check.")


def _copies(values: Any) -> list[Tensor]:
    """Return copies of the tensors in nested values."""
    return [x.detach().clone() for x in tree_leaves(values) if isinstance(x, Tensor)]
