"""Lightning callbacks, for any strategy."""

from lightning_longnet.callbacks.communication import CommunicationMonitor
from lightning_longnet.callbacks.memory import MemoryMonitor
from lightning_longnet.callbacks.monitor import Monitor
from lightning_longnet.callbacks.nonfinite import NonFiniteGuard
from lightning_longnet.callbacks.predictions import PredictedTexts
from lightning_longnet.callbacks.preemption import Preemption
from lightning_longnet.callbacks.progress import TrainingProgress
from lightning_longnet.callbacks.run_report import RunReport
from lightning_longnet.callbacks.samples import GenerateSamples
from lightning_longnet.callbacks.summary import FitSummary
from lightning_longnet.callbacks.throughput import TokenThroughput

__all__ = [
    "CommunicationMonitor",
    "FitSummary",
    "GenerateSamples",
    "MemoryMonitor",
    "Monitor",
    "NonFiniteGuard",
    "PredictedTexts",
    "Preemption",
    "RunReport",
    "TokenThroughput",
    "TrainingProgress",
]
