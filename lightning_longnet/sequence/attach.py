"""How modules come by their context: whoever made it gives it to all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_longnet.sequence.context import SequenceContext

if TYPE_CHECKING:
    from torch import nn

_HANDED = "_handed_sequence_context"  # where modules hold it that are no layers of ours


def hand_down(module: nn.Module, context: SequenceContext | None) -> None:
    """Give it to all modules in this one: the layers split their work by it, `sequence_context` finds it in any."""
    layers = 0
    for each in module.modules():
        if hasattr(type(each), "sequence_context"):
            each.sequence_context = context  # type: ignore[assignment]
            if hasattr(type(each), "layer_number"):
                each.layer_number = layers  # type: ignore[assignment]
                layers += 1
        elif context is not None:
            each.__dict__[_HANDED] = context
        else:
            each.__dict__.pop(_HANDED, None)


def sequence_context(module: nn.Module) -> SequenceContext:
    """That which a strategy, or `hand_down`, gave to a module; under a stock strategy one for whole sequences."""
    strategy = getattr(getattr(module, "_trainer", None), "strategy", None)
    for found in (
        getattr(module, "sequence_context", None),
        module.__dict__.get(_HANDED),
        getattr(strategy, "sequence_context", None),
    ):
        if isinstance(found, SequenceContext):
            return found
    return SequenceContext()
