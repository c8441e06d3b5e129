"""Activation checkpointing that recomputes the cheap part of a block, and keeps what attention gave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import lightning_longnet.attention.attend  # noqa: F401  registers the operator that is named below

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


def keep_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """As `context_fn` of torch's `checkpoint`: attention's out and lse are kept, all else is computed again.

    With dropout leave `preserve_rng_state` True, as it is: the seed is drawn again.

    >>> from torch.utils.checkpoint import checkpoint
    >>> from lightning_longnet import DilatedSelfAttention, Pattern, keep_attention
    >>> layer = DilatedSelfAttention(32, 4, Pattern.dilated((16, 64), (1, 4)))
    >>> x = torch.randn(1, 100, 32, requires_grad=True)
    >>> checkpoint(layer, x, use_reentrant=False, context_fn=keep_attention).sum().backward()
    """
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-any-return]


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_attention = operator is torch.ops.lightning_longnet.attend.default
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE
