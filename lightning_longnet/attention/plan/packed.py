"""`PackedRows`: where the documents of a batch begin, kept for as long as the tensor of their ids lives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

from lightning_longnet.attention.plan.batches import CALL_ROWS
from lightning_longnet.attention.plan.blocks import COPIED_ROWS, make_plan
from lightning_longnet.attention.plan.documents import document_cuts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lightning_longnet.attention.pattern.pattern import Pattern
    from lightning_longnet.attention.plan.blocks import Plan


@dataclass(frozen=True, eq=False)
class PackedRows:
    """The documents of the rows of a batch, with the plans that were made for them.

    `unsharded_call` gets it from `packed_rows`, or makes it for rows of one document.

    Args:
        rows: for each row where its documents begin, and where the last one ends.
    """

    rows: tuple[tuple[int, ...], ...]

    @cached_property
    def are_equal(self) -> bool:
        """Whether all rows have the same documents: then they are samples of one call, else `unsharded_call` joins
        them.
        """
        return len(set(self.rows)) == 1

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """The cuts of one row if all are equal, else those of one long row: all rows one behind the other.

        `unsharded_call` draws the lines of the pattern by them, `_line_call` plans blocks and counts null keys.
        """
        if self.are_equal:
            return self.rows[0]
        length = self.rows[0][-1]
        cuts = (cut + row * length for row, cuts in enumerate(self.rows) for cut in cuts[:-1])
        return tuple(chain(cuts, (length * len(self.rows),)))

    @cached_property
    def _plans(self) -> dict[Any, Plan]:
        """The plans that were made, by the arguments of `plan`."""
        return {}

    def plan(self, pattern: Pattern, heads: int, kv_heads: int, weighted_segments: int, is_on_cpu: bool) -> Plan:
        """Return the plan of the documents, `make_plan` of `cuts`, made once for the same arguments.

        `_line_call` asks for it in each forward and backward of rows with several documents.
        """
        copied_rows = CALL_ROWS // heads if is_on_cpu else COPIED_ROWS
        key = pattern, heads, kv_heads, weighted_segments, copied_rows
        if key not in self._plans:
            self._plans[key] = make_plan(pattern, heads, kv_heads, self.cuts, weighted_segments, copied_rows)
        return self._plans[key]


class _View(NamedTuple):
    """A tensor as a view of its storage, at one time: its place, its layout, and the number of changes before."""

    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    version: int

    @classmethod
    def of(cls, x: Tensor) -> _View:
        """Return the view that a tensor is now."""
        return cls(int(x.storage_offset()), x.shape, x.stride(), x.dtype, x._version)


class _Kept(NamedTuple):
    """The packed rows of the views of one storage, and on a CPU the ids that they were read from."""

    storage: ref[Any]
    views: dict[_View, tuple[PackedRows, Tensor | None]]


MOST_VIEWS = 16  # a storage has at most so many entries; the oldest is removed
_KEPT: dict[int, _Kept] = {}  # by the id of the storage, which removes its entry when it is freed


def packed_rows(documents: Tensor) -> PackedRows:
    """Return where the documents of ids (B, N) begin, cached for as long as the storage of the ids lives.

    An entry is reused while the view and its version counter are unchanged.  On a CPU the ids are compared too, so that
    writes that torch does not count are noticed.  On other devices this would wait for the device.  `unsharded_call`
    asks for them in each forward and backward.
    """
    batch, length = documents.shape
    if documents.is_inference():  # torch does not count its changes
        return PackedRows(tuple(document_cuts(documents, batch, length)))
    storage = documents.untyped_storage()
    key, view = id(storage), _View.of(documents)
    kept = _KEPT.get(key)
    if kept is None or kept.storage() is not storage:
        kept = _KEPT[key] = _Kept(ref(storage, lambda _: _KEPT.pop(key, None)), {})
    known = kept.views.get(view)
    # a row that was expanded to many is compared once
    ids = documents[:1] if batch > 1 and documents.stride(0) == 0 else documents
    if known is None or (known[1] is not None and not known[1].equal(ids)):
        rows = PackedRows(tuple(document_cuts(documents, batch, length)))
        for old in [other for other in kept.views if other.version != view.version]:
            del kept.views[old]
        if len(kept.views) == MOST_VIEWS:  # a data set may be one tensor, each batch a view of it
            del kept.views[next(iter(kept.views))]
        known = kept.views[view] = rows, ids.clone() if documents.device.type == "cpu" else None
    return known[0]
