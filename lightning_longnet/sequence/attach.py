"""Attaching a `SequenceContext` to modules, and finding it there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_longnet.sequence.context import SequenceContext
from lightning_longnet.sequence.dropout_hooks import ATTACHED, set_hooks

if TYPE_CHECKING:
    from torch import nn


def attach_context(module: nn.Module, context: SequenceContext | None) -> None:
    """Attach a context to a module and all modules inside it; None detaches it.

    `RingSequenceParallelStrategy` calls it when a run is set up and when it ends, and the split check for its copies of
    the module.  So do `longnet plan`, the commands that score or embed texts on several ranks, and `whole_documents`
    for a model of transformers without a context.  A training loop without the strategy calls it once, when the ranks
    are connected.  Attention layers of this package then take parts of sequences, and `sequence_context` returns the
    context for any module inside.  Dropout modules of torch get hooks, with which each rank drops other elements of its
    part of a sequence; see `SequenceContext.dropout`.  Attention layers are numbered in the order of
    `module.modules()`: the seed of their dropout depends on the number.
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
    """Return the context that `attach_context` attached to a module, or that the strategy of its Trainer has.

    Modules, datasets and callbacks call it to find out which tokens this rank holds.  Where there is no context, as
    under another strategy, it returns a new one, in which sequences are whole.
    """
    strategy = getattr(getattr(module, "_trainer", None), "strategy", None)
    context = attached_context(module) or getattr(strategy, "sequence_context", None)
    return context if isinstance(context, SequenceContext) else SequenceContext()


def attached_context(module: nn.Module) -> SequenceContext | None:
    """Return the context that `attach_context` gave to this very module, or None; a Trainer's is not looked up.

    `sequence_context` asks first; `has_context_of_user` and `_forward_in_chunks` of models of transformers ask for this
    module alone.
    """
    for context in (getattr(module, "sequence_context", None), module.__dict__.get(ATTACHED)):
        if isinstance(context, SequenceContext):
            return context
    return None
