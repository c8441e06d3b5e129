"""Selective activation checkpointing that saves the output of attention and recomputes the rest of a block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import lightning_longnet.attention.attend  # noqa: F401  registers the operator that `_policy` names

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


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


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Return MUST_SAVE for the attention operator, and PREFER_RECOMPUTE for all others."""
    is_attention = operator is torch.ops.lightning_longnet.attend.default
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE
