"""Which shard serves which layer of a batch: one for all that are handed the same documents and padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lightning_longnet.attention.parallel.shard import SequenceShard


class _Made(NamedTuple):
    """A shard, and the very tensors that it was made with."""

    documents: Tensor | None
    padding: Tensor | None
    versions: tuple[int, int]
    shard: SequenceShard


class _Converted(NamedTuple):
    mask: Tensor
    version: int
    into: str
    result: Tensor


class BatchShards:
    """Those of one batch, each made at its first use."""

    def __init__(self) -> None:
        self._made: list[_Made] = []
        self._converted: list[_Converted] = []

    def of(self, documents: Tensor | None, padding: Tensor | None, make: Callable[[], SequenceShard]) -> SequenceShard:
        """The one of these very tensors."""
        versions = _version(documents), _version(padding)
        for made in self._made:
            same = _is_same(made.documents, documents) and _is_same(made.padding, padding)
            if same and made.versions == versions:
                return made.shard
        shard = make()
        self._made.append(_Made(documents, padding, versions, shard))
        return shard

    def once(self, mask: Tensor, into: str, convert: Callable[[], Tensor]) -> Tensor:
        """What became of this very mask, so that layers which convert it share a shard; `into` names the conversion."""
        for known in self._converted:
            if _is_same(known.mask, mask) and (known.version, known.into) == (_version(mask), into):
                return known.result
        result = convert()
        self._converted.append(_Converted(mask, _version(mask), into, result))
        return result


def _version(x: Tensor | None) -> int:
    """How often it was changed; tensors of inference mode do not count."""
    return -1 if x is None or x.is_inference() else x._version


def _is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """The same numbers at the same place, whatever object stands for them.  Values must not decide: ranks differ."""
    if a is None or b is None:
        return a is b
    return a is b or (a.dtype == b.dtype and a.is_set_to(b))
