"""Sequences that are split over ranks: the context of a module, without Lightning."""

from lightning_longnet.sequence.attach import attach_context, hand_down, sequence_context
from lightning_longnet.sequence.context import SequenceContext
from lightning_longnet.sequence.mesh import sequence_mesh
from lightning_longnet.sequence.parts import SequencePart

__all__ = ["SequenceContext", "SequencePart", "attach_context", "hand_down", "sequence_context", "sequence_mesh"]
