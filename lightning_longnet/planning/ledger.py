"""`Ledger`: records when code on fake tensors allocates and frees each storage."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_longnet.attention.op  # noqa: F401  registers the operator that is named below

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor


class Event(NamedTuple):
    """The allocation of a storage, or with negative `bytes` its release, in a phase of the step."""

    phase: str
    kind: str
    bytes: int
    storage: int


class Ledger(TorchDispatchMode):
    """Records the storages that operators allocate, and their release.

    Attributes:
        phase, kind: the phase and the kind of what is allocated from now on.
        events: the events in their order.
        moved: the bytes that operators other than products read and wrote.
        calls: the number of operators that allocated something.

    Args:
        workspace: for opaque operators, a function of their arguments that returns the bytes which they hold while they
            run, beyond their results.
    """

    def __init__(self, workspace: Mapping[Any, Callable[..., int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase, self.kind = "", "activations"
        self.events: list[Event] = []
        self.moved = self.calls = 0
        self._workspace = workspace
        self._known: dict[int, tuple[int, Any]] = {}
        self._made = 0

    def knows(self, x: Tensor) -> None:
        """Leave out a tensor that exists before anything runs, and is counted elsewhere."""
        storage = x.untyped_storage()
        self._known[id(storage)] = 0, weakref.ref(storage)

    def storages(self, tensors: Iterable[Tensor]) -> set[int]:
        """Return the numbers of the storages of these tensors."""
        return {self._known[id(x.untyped_storage())][0] for x in tensors}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = operator(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        kept = results[3:] if operator is _ATTENTION else []
        made = sum(self._note(x, "exchange" if any(x is each for each in kept) else self.kind) for x in results)
        self.calls += bool(made)
        if (workspace := self._workspace.get(operator)) is not None:
            extra = workspace(*args, **kwargs)
            self.events += [
                Event(self.phase, self.kind, extra, -1),
                Event(self.phase, self.kind, -extra, -1),
            ]
        elif made and operator not in _PRODUCTS:
            read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.moved += sum(x.numel() * x.element_size() for x in (*read, *results))
        return out

    def _note(self, x: Tensor, kind: str) -> int:
        storage = x.untyped_storage()
        key, many = id(storage), storage.nbytes()
        if key in self._known or not many:
            return 0
        self._made += 1
        number = self._made

        def released(_: Any) -> None:
            del self._known[key]
            self.events.append(Event(self.phase, kind, -many, number))

        self._known[key] = number, weakref.ref(storage, released)
        self.events.append(Event(self.phase, kind, many, number))
        return many


_ATTENTION = torch.ops.lightning_longnet.attend.default  # over ranks its results are out, lse, a number, and rows
_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
}
