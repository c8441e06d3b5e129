"""The memory of a rank at its fullest, by kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lightning_longnet.planning.engines import Engine, Held, Weights
from lightning_longnet.planning.traced import BACKWARD, Moment, Trace

if TYPE_CHECKING:
    from lightning_longnet.planning.job import Job

STEP = "the optimiser's step"
_NOTHING = Moment(STEP, 0, 0, 0, 0)


class Memory(NamedTuple):
    """The bytes of each kind at the fullest moment of a step."""

    phase: str
    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    exchange: float
    loss: float

    @property
    def kinds(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in self._fields[1:]}

    @property
    def peak(self) -> float:
        return sum(self.kinds.values())


def memory(job: Job, weights: Weights, traced: Trace) -> Memory:
    """Return the fullest of a trace's moments, each with what the engine holds in it."""
    engine = Engine(job, weights)
    moments = [
        _joined(m, engine.backward(m.gradients) if m.phase == BACKWARD else engine.forward()) for m in traced.moments
    ]
    return max((*moments, _joined(_NOTHING, engine.step())), key=lambda each: each.peak)


def _joined(moment: Moment, held: Held) -> Memory:
    return Memory(moment.phase, *held, moment.activations, moment.exchange, moment.loss)
