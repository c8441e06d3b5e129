"""The names of runs: of one that began anew, and of those that went on from its checkpoints."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from uuid import NAMESPACE_OID, uuid4, uuid5

if TYPE_CHECKING:
    from collections.abc import Sequence

# what says that a process runs the same job again: a requeued one, or one that a supervisor has restarted
_JOBS = (("SLURM_JOB_ID", "SLURM_STEP_ID"), ("TORCHELASTIC_RUN_ID",), ("LIGHTNING_LONGNET_SUPERVISION",))
_NO_JOB = ("", "none")

Lineage = tuple[str, ...]  # the names of a run, the last, and of those whose checkpoints led to it


def first_run() -> Lineage:
    """Return the lineage of a run that begins anew."""
    return (uuid4().hex,)


def continued(saved: str | Sequence[str]) -> Lineage:
    """Return the lineage of a run that goes on from a checkpoint, which has saved that of its own run.

    Runs that go on from one checkpoint have names of their own, unless they are the same job, begun again.
    """
    earlier = (saved,) if isinstance(saved, str) else tuple(saved)
    for names in _JOBS:
        job = [os.environ.get(name, "") for name in names]
        if job[0] not in _NO_JOB:
            return *earlier, uuid5(NAMESPACE_OID, " ".join([*names, *job, *earlier])).hex
    return *earlier, uuid4().hex
