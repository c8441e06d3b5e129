"""Collectives on many tensors, several of which travel in one message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

_NUMBERS = 2**22  # of a message; a larger tensor has one to itself


def in_buckets(
    collective: Callable[[Tensor], Any], tensors: Iterable[Tensor], device: torch.device | None = None
) -> None:
    """Run a collective that works in place and on each number alone, with one message for many small tensors.

    FSDP2's `_shard` and the split check's `Replica` broadcast parameters with it, and `Outcome.averaged` adds
    gradients.

    Args:
        collective: called with the numbers of several tensors, or with a tensor.
        tensors: of the same shapes and in the same order on all ranks.
        device: the device of the messages; that of the tensors by default.
    """
    for bucket in _buckets(tensors):
        joined = bucket[0] if len(bucket) == 1 else torch.cat([x.reshape(-1) for x in bucket])
        message = joined.to(joined.device if device is None else device).contiguous()
        collective(message)
        if message is bucket[0]:
            continue
        for x, part in zip(bucket, message.reshape(-1).split([x.numel() for x in bucket]), strict=True):
            x.copy_(part.view(x.shape))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in lists of one dtype and device each, of at most `_NUMBERS` elements or a single tensor."""
    filling: dict[Any, list[Tensor]] = {}
    for x in tensors:
        kind = x.dtype, x.device
        bucket = filling.setdefault(kind, [])
        if bucket and sum(each.numel() for each in bucket) + x.numel() > _NUMBERS:
            yield filling.pop(kind)
            bucket = filling.setdefault(kind, [])
        bucket.append(x)
    yield from filling.values()
