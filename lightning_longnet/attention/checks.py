"""Checks of single arguments of `attend`: each returns the argument, or raises a ValueError that names it.

Tensors are as `attend` takes them here: q (batch, tokens, heads, D), not (batch, heads, rows, D) as in kernels.
`prepared_call` calls these functions for each call of `attend`, and `explain` some of them.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_longnet.attention.kernels import kernel_names, reference
from lightning_longnet.attention.parallel.shard import SequenceShard
from lightning_longnet.attention.pattern.lines import check_ordering
from lightning_longnet.attention.pattern.pattern import Pattern

if TYPE_CHECKING:
    from collections.abc import Collection

    from lightning_longnet.attention.pattern.ordering import Ordering
    from lightning_longnet.attention.spec import Mix


def checked_tensors(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return q, k and v, cast by autocast where it is enabled, and the documents as (B, N), for `attend`.

    `prepared_call` calls it first, as other checks compare with q; `explain` calls it, too.  If a tensor does not fit
    the others, a ValueError names it.
    """
    if not isinstance(pattern, Pattern):
        raise ValueError(f"pattern must be a Pattern, got {type(pattern).__name__}: see Pattern.dilated, dense, window")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must be (batch, tokens, heads, head_dim), got shape {tuple(x.shape)}")
        if not x.dtype.is_floating_point:
            raise ValueError(f"{name} must have a floating-point dtype, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        if x.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{name} must have the batch and tokens of q, {tuple(q.shape[:2])}, got {tuple(x.shape[:2])}"
            )
    if q.shape[3] < 1 or v.shape[3] < 1 or k.shape[3] != q.shape[3]:
        raise ValueError(f"k must have the head_dim of q, {q.shape[3]}, at least 1, got {k.shape[3]} (v: {v.shape[3]})")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v must have the heads of k, {k.shape[2]}, got {v.shape[2]}")
    if k.shape[2] < 1 or q.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q must have a multiple of the {k.shape[2]} heads of k and v, got {q.shape[2]}")
    return q, k, v, _checked_documents(documents, q)


def _checked_documents(documents: Tensor | None, q: Tensor) -> Tensor | None:
    """Return the ids of documents as a view (B, N), or raise a ValueError if they do not fit q."""
    if documents is None:
        return None
    if not isinstance(documents, Tensor):
        raise ValueError(f"documents must be a tensor of integer ids, got {type(documents).__name__}")
    if documents.dtype.is_floating_point or documents.dtype.is_complex or documents.dtype == torch.bool:
        raise ValueError(f"documents must be integer ids, got {documents.dtype}")
    if documents.device != q.device:
        raise ValueError(f"documents must be on the device of q, {q.device}, got {documents.device}")
    if documents.dim() not in (1, 2) or documents.shape != q.shape[2 - documents.dim() : 2]:
        raise ValueError(
            f"documents must be (tokens,) or (batch, tokens), {tuple(q.shape[1:2])} or {tuple(q.shape[:2])}, "
            f"got {tuple(documents.shape)}"
        )
    return documents.expand(q.shape[:2])


def check_shard(shard: SequenceShard, q: Tensor, documents: Tensor | None, padding: Tensor | None, kernel: str) -> None:
    """Raise a ValueError where a shard does not fit the other arguments of a call: its tokens, its batch, its masks.

    `prepared_call` calls it for each call with a shard.
    """
    if not isinstance(shard, SequenceShard):
        raise ValueError(f"shard must be a SequenceShard, got {type(shard).__name__}")
    if kernel == reference.name:
        raise ValueError(_reference_refusal("where a shard holds a part of the sequence"))
    for name, x in (("documents", documents), ("key_padding_mask", padding)):
        if x is not None:
            raise ValueError(f"{name} must be None where a shard is given, which was made with its own")
    here = shard.placement.lengths[shard.rank]
    if q.shape[1] != here:
        raise ValueError(f"q must have the shard's {here} tokens of rank {shard.rank}, got {q.shape[1]}")
    if len(shard.cuts) not in (1, q.shape[0]):
        raise ValueError(f"q must have the batch of the shard's documents, {len(shard.cuts)}, got {q.shape[0]}")
    if shard.key_padding_mask is not None and len(shard.key_padding_mask) != q.shape[0]:
        expected = len(shard.key_padding_mask)
        raise ValueError(f"q must have the batch of the shard's key_padding_mask, {expected}, got {q.shape[0]}")


def checked_padding(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Return the mask, or raise a ValueError if it is not a mask of the keys of q, (B, N).

    `prepared_call` calls it for each call of `attend`, and `explain`.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"key_padding_mask must be a tensor of bools, True where a key is ignored, got {got}")
    if mask.shape != q.shape[:2]:
        raise ValueError(f"key_padding_mask must be (batch, tokens), {tuple(q.shape[:2])}, got {tuple(mask.shape)}")
    if mask.device != q.device:
        raise ValueError(f"key_padding_mask must be on the device of q, {q.device}, got {mask.device}")
    return mask


def checked_probability(dropout: float) -> None:
    """Raise a ValueError if a probability of dropout is not in [0, 1).

    `seed_tensor` calls it, and `explain`.
    """
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a probability, at least 0 and less than 1, got {dropout!r}")


def checked_softcap(softcap: Any) -> float | None:
    """Return the bound of the scores as a float, or raise a ValueError if it is no positive number.

    `prepared_call` calls it for each call of `attend`, and `explain`.
    """
    if softcap is None:
        return None
    if not isinstance(softcap, (int, float)) or isinstance(softcap, bool) or not 0 < softcap < inf:
        raise ValueError(f"softcap must be a positive, finite number or None, got {softcap!r}")
    return float(softcap)


def checked_exclusions(names: Collection[str]) -> frozenset[str]:
    """Return the names of excluded kernels as a set, or raise a ValueError if one is no kernel.

    `prepared_call` calls it for each call of `attend`, and `explain`.
    """
    if not names:
        return frozenset()
    known = kernel_names()
    for name in (names,) if isinstance(names, str) else names:
        if name not in known or isinstance(names, str):
            raise ValueError(f"excluded_kernels must be a collection of {', '.join(map(repr, known))}, got {names!r}")
    return frozenset(names)


def seed_tensor(dropout: float, seed: int | Tensor | None) -> Tensor | None:
    """Return the seed of dropout as a CPU tensor, (); None where nothing is dropped.

    If it is None, torch's CPU generator draws it, so that each call advances this generator.  `prepared_call` calls it
    for each call of `attend`.
    """
    checked_probability(dropout)
    if isinstance(seed, Tensor):
        if seed.dtype.is_floating_point or seed.dtype.is_complex or seed.numel() != 1 or seed.device.type != "cpu":
            raise ValueError(
                f"dropout_seed must be one integer, as a tensor on the CPU, got {tuple(seed.shape)} {seed.dtype} on "
                f"{seed.device}"
            )
    elif seed is not None and (not isinstance(seed, int) or not -(2**63) <= seed < 2**63):
        raise ValueError(f"dropout_seed must be an integer of 64 bits, got {seed!r}")
    if dropout == 0:
        return None
    if isinstance(seed, Tensor):
        return seed.long().reshape(())
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), device="cpu")
    return torch.tensor(seed, device="cpu")


def _reference_refusal(where: str) -> str:
    """Return the error message for a call that the kernel "reference" cannot compute; `where` says which calls."""
    return (
        f"kernel must be 'auto' or 'eager', or another that computes a sequence piece by piece, {where}, got "
        f"'reference', which computes all scores of a whole sequence in its order"
    )


def check_reordering(ordering: Ordering, pattern: Pattern, kernel: str) -> None:
    """Raise a ValueError where rows cannot be reordered; `prepared_call` asks where ordering is not "raster"."""
    if kernel == reference.name:
        raise ValueError(_reference_refusal(f"where ordering is {ordering!r}"))
    check_ordering(ordering, pattern)


def checked_sinks(sinks: Tensor | None, q: Tensor, mix: Mix) -> Tensor | None:
    """Return the sinks, or raise a ValueError if they are not one logit for each query head, (H,); None is no sinks.

    `prepared_call` calls it for each call of `attend`.
    """
    if sinks is None:
        return None
    if not isinstance(sinks, Tensor) or not sinks.dtype.is_floating_point or sinks.shape != q.shape[2:3]:
        got = f"{sinks.dtype} {tuple(sinks.shape)}" if isinstance(sinks, Tensor) else type(sinks).__name__
        raise ValueError(f"sinks must be a floating-point tensor of one logit a head, ({q.shape[2]},), got {got}")
    if sinks.device != q.device:
        raise ValueError(f"sinks must be on the device of q, {q.device}, got {sinks.device}")
    if mix == "detached":
        raise ValueError("sinks must be None where mix is 'detached', whose branches are no one softmax")
    return sinks
