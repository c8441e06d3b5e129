"""`PreparedCall`: the arguments of `attend`, checked, with the kernel that was chosen and the seed that was drawn."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, get_args

import torch

from lightning_longnet.attention.checks import (
    check_reordering,
    check_shard,
    checked_exclusions,
    checked_padding,
    checked_sinks,
    checked_softcap,
    checked_tensors,
    seed_tensor,
)
from lightning_longnet.attention.kernels import Request, has_few_keys, reference, select
from lightning_longnet.attention.kernels.compiling import constant_result
from lightning_longnet.attention.parallel.schedule import Exchange
from lightning_longnet.attention.pattern.lines import has_masked_line
from lightning_longnet.attention.pattern.ordering import Ordering
from lightning_longnet.attention.spec import AttentionSpec, Mix

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from lightning_longnet.attention.parallel.shard import SequenceShard
    from lightning_longnet.attention.pattern.pattern import Pattern

_MIXES, _EXCHANGES, _ORDERINGS = get_args(Mix), get_args(Exchange), get_args(Ordering)


class AttendOptions(TypedDict, total=False):
    """The keyword arguments of `attend` but return_lse, which decides what it returns.

    Layers, contexts and `attend` itself make such a dictionary and pass it on.
    """

    documents: Tensor | None
    key_padding_mask: Tensor | None
    dropout: float
    dropout_seed: int | Tensor | None
    dropout_samples: tuple[int, int]
    scale: float | None
    mix: Mix
    kernel: str
    shard: SequenceShard | None
    exchange: Exchange
    ordering: Ordering
    sinks: Tensor | None
    softcap: float | None
    excluded_kernels: Collection[str]


class PreparedCall(NamedTuple):
    """A call as the operator takes it: its tensors, its spec, and what kernels judged it by.

    The first seven fields are those of `op.forward`, in its order.  With a shard, documents and padding are None: the
    shard holds them.  `prepared_call` makes it; `attend` computes it, and a `Guard` reads which kernel it names.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    documents: Tensor | None
    key_padding_mask: Tensor | None
    seed: Tensor | None
    spec: AttentionSpec
    request: Request


def prepared_call(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, options: Mapping[str, Any], return_lse: bool = False
) -> PreparedCall:
    """Return the call as the operator takes it: with checked arguments, a chosen kernel, and a seed if one is needed.

    `attend` calls it for each call, and a `Guard` in its preflight, and once more to find the kernel that replaces a
    broken one.  A wrong argument raises a ValueError.

    Args:
        q, k, v, pattern, return_lse: the arguments of `attend`.
        options: the other arguments of `attend`, by their names.
    """
    get = options.get
    shard, mix, exchange, ordering = (
        get("shard"),
        get("mix", "exact"),
        get("exchange", "auto"),
        get("ordering", "raster"),
    )
    dropout, samples, scale = get("dropout", 0.0), get("dropout_samples", (0, 1)), get("scale")
    q, k, v, documents = checked_tensors(q, k, v, pattern, get("documents"))
    choices = ("mix", mix, _MIXES), ("exchange", exchange, _EXCHANGES), ("ordering", ordering, _ORDERINGS)
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    if scale is not None and (not isinstance(scale, (int, float)) or not 0 < scale < inf):
        raise ValueError(f"scale must be a positive, finite number, got {scale!r}")
    padding = checked_padding(get("key_padding_mask"), q)
    kernel = get("kernel", "auto")
    if shard is not None:
        check_shard(shard, q, documents, padding, kernel)
        padding = shard.key_padding_mask
    if ordering != "raster":
        check_reordering(ordering, pattern, kernel)
    sinks = checked_sinks(get("sinks"), q, mix)
    seed = seed_tensor(dropout, get("dropout_seed"))
    if not isinstance(samples, tuple) or len(samples) != 2 or any(type(n) is not int for n in samples):
        raise ValueError(f"dropout_samples must be two integers, (first, step), got {samples!r}")
    request = request_of(q, v, pattern, padding is not None, dropout > 0)
    softcap = checked_softcap(get("softcap"))
    excluded = checked_exclusions(get("excluded_kernels", ()))
    if excluded and (shard is not None or ordering != "raster"):
        excluded |= {reference.name}  # "auto" comes to it where the others are excluded
    request = request._replace(
        masks_later=has_masked_line(ordering, pattern), has_softcap=softcap is not None, excluded=excluded
    )
    spec = AttentionSpec(
        pattern,
        select(kernel, request),
        None if scale is None else float(scale),
        float(dropout),
        samples[0],
        samples[1],
        mix,
        exchange,
        ordering,
        return_lse or sinks is not None,
        softcap,
    )
    return PreparedCall(q, k, v, sinks, documents, None if shard is not None else padding, seed, spec, request)


def request_of(q: Tensor, v: Tensor, pattern: Pattern, is_padded: bool, has_dropout: bool) -> Request:
    """Return the properties of a call by which kernels judge whether they can compute it; see `judge`.

    `prepared_call` and `explain` call it, and fill in the fields that it leaves at their defaults.
    """
    return Request(
        q.device.type,
        q.dtype,
        q.shape[1],
        q.shape[2],
        q.shape[3],
        v.shape[3],
        is_padded,
        has_dropout,
        _capability(q.device.index) if q.device.type == "cuda" else None,
        has_few_keys(pattern),
    )


@constant_result
def _capability(index: int) -> tuple[int, int]:
    """Return the compute capability of a CUDA device, (major, minor), as a constant of a compiled graph."""
    return torch.cuda.get_device_capability(index)
