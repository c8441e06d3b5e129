"""Plans of runs before they are launched: memory, bytes and time, computed without a GPU and without other ranks."""

from lightning_longnet.planning.devices import Device, named
from lightning_longnet.planning.job import Job
from lightning_longnet.planning.run import RunPlan, plan_run

__all__ = ["Device", "Job", "RunPlan", "named", "plan_run"]
