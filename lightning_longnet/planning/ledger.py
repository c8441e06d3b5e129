"""What tensors hold in memory while code runs on fake ones: every storage when it comes, and when it goes."""

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
    """So many bytes of a kind more, or fewer, in a phase of the step; `storage` tells which they are."""

    phase: str
    kind: str
    bytes: int
    storage: int


class Ledger(TorchDispatchMode):
    """Notes what operators make and what is let go.

    Attributes:
        phase, kind: of what is made from now on.
        events: in their order.
        moved: bytes that operators other than products read and wrote.
        calls: of operators that made something.

    Args:
        workspace: for operators in which fake tensors do not look, what they hold while they run, beyond their results.
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
        """It is there before anything runs, and counted elsewhere."""
        storage = x.untyped_storage()
        self._known[id(storage)] = 0, weakref.ref(storage)

    def storages(self, tensors: Iterable[Tensor]) -> set[int]:
        """The numbers of those that hold these tensors."""
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

        def let_go(_: Any) -> None:
            del self._known[key]
            self.events.append(Event(self.phase, kind, -many, number))

        self._known[key] = number, weakref.ref(storage, let_go)
        self.events.append(Event(self.phase, kind, many, number))
        return many


_ATTENTION = torch.ops.lightning_longnet.attend.default  # over ranks its results are out, lse, a number, and rows
_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
}
