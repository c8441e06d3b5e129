"""Lightning callbacks, for any strategy."""

from lightning_longnet.callbacks.preemption import Preemption

__all__ = ["Preemption"]
