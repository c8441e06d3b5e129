"""Selective activation checkpointing that saves the output of attention and recomputes the rest of a block."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lightning_longnet.attention.attend  # noqa: F401  registers the operator that `_is_attention` names
from lightning_longnet.layers import offloading

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import Tensor


def keep_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the two contexts that torch's `checkpoint` takes as `context_fn`.

    The out and lse of attention are saved in the forward; everything else is recomputed in the backward.  Over ranks a
    recomputation therefore sends no keys.  With dropout, leave `preserve_rng_state` at its default of True: the
    recomputation samples the seed again, and must get the same one.

    >>> from torch.utils.checkpoint import checkpoint
    >>> from lightning_longnet import DilatedSelfAttention, Pattern, keep_attention
    >>> layer = DilatedSelfAttention(32, 4, Pattern.dilated((16, 64), (1, 4)))
    >>> x = torch.randn(1, 100, 32, requires_grad=True)
    >>> checkpoint(layer, x, use_reentrant=False, context_fn=keep_attention).sum().backward()
    """
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-any-return]


def keep_attention_on_host() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the two contexts of `keep_attention`, which keep what is saved in the memory of the host."""
    kept: deque[Any] = deque()
    return _Storing(kept), _Loading(kept)


class _Storing(TorchDispatchMode):
    """Stores the results of attention on the host, in the order of its calls."""

    def __init__(self, kept: deque[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operator(*args, **(kwargs or {}))
        if _is_attention(operator):
            self.kept.append(tree_map_only(torch.Tensor, lambda x: offloading.store(x), out))
        return out


class _Loading(_Storing):
    """Returns the results of attention from the host instead of computing them."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_attention(operator):
            return operator(*args, **(kwargs or {}))
        if not self.kept:
            raise RuntimeError(
                "results of attention on the host serve one backward: retain_graph=True needs them twice"
            )
        return tree_map_only(offloading.Stored, lambda x: offloading.load(x), self.kept.popleft())


def in_chunks(compute: Callable[..., Tensor], x: Tensor, chunk_tokens: int, *arguments: Any) -> Tensor:
    """Return `compute(x, *arguments)` of x (..., N, width), computed and recomputed in chunks of tokens.

    `compute` must map each token by itself.  At any time, in the forward and the backward, one chunk's intermediate
    values are in memory.
    """
    chunks = x.split(chunk_tokens, dim=-2)
    if not torch.is_grad_enabled():  # one result, and no list of chunks beside it
        first = compute(chunks[0], *arguments)
        out = first.new_empty(*x.shape[:-1], first.shape[-1])
        for some, chunk in zip(out.split(chunk_tokens, dim=-2), chunks, strict=True):
            some.copy_(first if chunk is chunks[0] else compute(chunk, *arguments))
        return out
    return torch.cat([checkpoint(compute, chunk, *arguments, use_reentrant=False) for chunk in chunks], dim=-2)


def _is_attention(operator: Any) -> bool:
    return operator is torch.ops.lightning_longnet.attend.default


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Return MUST_SAVE for the attention operator, and PREFER_RECOMPUTE for all others."""
    return CheckpointPolicy.MUST_SAVE if _is_attention(operator) else CheckpointPolicy.PREFER_RECOMPUTE
