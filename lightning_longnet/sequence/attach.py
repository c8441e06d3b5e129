"""Attaching a context to modules, and finding it there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_longnet.sequence.context import SequenceContext
from lightning_longnet.sequence.dropout_hooks import ATTACHED, set_hooks

if TYPE_CHECKING:
    from torch import nn


def attach_context(module: nn.Module, context: SequenceContext | None) -> None:
    """Attach a context to a module and all modules inside it; None detaches it.

    Layers split their work by it, and `sequence_context` returns it for any of them.  Dropout modules of torch get
    hooks, with which each rank drops other elements of its part of a sequence; see `SequenceContext.dropout`.
    """
    layers = 0
    for child in module.modules():
        if hasattr(type(child), "sequence_context"):
            child.sequence_context = context  # type: ignore[assignment]
            if hasattr(type(child), "layer_number"):
                child.layer_number = layers  # type: ignore[assignment]
                layers += 1
        elif context is not None:
            child.__dict__[ATTACHED] = context
        else:
            child.__dict__.pop(ATTACHED, None)
        set_hooks(child, context)


hand_down = attach_context  # the former name


def sequence_context(module: nn.Module) -> SequenceContext:
    """Return the context that a strategy or `attach_context` attached to a module; else one for whole sequences."""
    strategy = getattr(getattr(module, "_trainer", None), "strategy", None)
    context = attached_context(module) or getattr(strategy, "sequence_context", None)
    return context if isinstance(context, SequenceContext) else SequenceContext()


def attached_context(module: nn.Module) -> SequenceContext | None:
    """Return the context that is attached to a module itself, or None."""
    for context in (getattr(module, "sequence_context", None), module.__dict__.get(ATTACHED)):
        if isinstance(context, SequenceContext):
            return context
    return None
