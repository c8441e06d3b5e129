"""What a module needs to know where its sequences are split over ranks: torch and the core alone, no Lightning."""

from lightning_longnet.sequence.attach import hand_down, sequence_context
from lightning_longnet.sequence.context import SequenceContext
from lightning_longnet.sequence.mesh import sequence_mesh
from lightning_longnet.sequence.parts import SequencePart

__all__ = ["SequenceContext", "SequencePart", "hand_down", "sequence_context", "sequence_mesh"]
