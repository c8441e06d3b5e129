"""The program of a rank of `longnet doctor`: it checks the exchanges, and writes its findings to torch's store.

`lightning_longnet.diagnosis.ranks` starts it as `python -m lightning_longnet.diagnosis.rank`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lightning_longnet.diagnosis.exactness import check_exchanges

# of a rank whose peers fail, and of backends that do not work here
_REPORTED = (RuntimeError, ValueError, OSError)


class Job(NamedTuple):
    """The arguments of a rank.

    Attributes:
        rank, ranks: its number, and how many there are.
        local_rank: its number on this machine.
        local_ranks: how many there are on this machine.
        host, port: where the store is.
        backend: "gloo" or "nccl".
        timeout: seconds after which it ends.
        parent: the process that waits for it.
    """

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int
    host: str
    port: int
    backend: str
    timeout: float
    parent: int


def main(text: str) -> None:
    """Check all exchanges as the rank that `text`, a `Job` as JSON, describes."""
    job = Job(**json.loads(text))
    threading.Thread(target=_end, args=(job.parent, time.monotonic() + job.timeout), daemon=True).start()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.local_ranks))
    timeout = timedelta(seconds=job.timeout)
    store = connected(job.host, job.port, job.timeout)
    store.set(f"at/{job.rank}", "connecting to the other ranks")
    try:
        device = torch.device("cpu")
        if job.backend == "nccl":
            device = torch.device("cuda", job.local_rank)
            torch.cuda.set_device(device)
        own = dist.PrefixStore("group", store)  # type: ignore[attr-defined]
        dist.init_process_group(job.backend, store=own, rank=job.rank, world_size=job.ranks, timeout=timeout)
        group = dist.group.WORLD
        assert group is not None
        findings = []
        for finding in check_exchanges(group, device, lambda name: store.set(f"at/{job.rank}", f"in {name}")):
            findings.append(finding)
        store.set(f"answer/{job.rank}", json.dumps(findings))
    except _REPORTED as error:
        first = next(iter(str(error).strip().splitlines()), "")
        store.set(f"error/{job.rank}", f"{type(error).__name__}: {first}")
        raise
    dist.destroy_process_group()


def connected(host: str, port: int, timeout: float) -> Any:
    """Return a client of the key-value store in which the ranks of a diagnosis write their findings."""
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout))  # type: ignore[attr-defined]
    return dist.PrefixStore("doctor", store)  # type: ignore[attr-defined]


def _end(parent: int, deadline: float) -> None:
    """End this process when its parent has ended or at the deadline; the target of a thread.

    A thread ends the process also in a collective, which handles no signal.
    """
    while os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(0.2)
    os._exit(3)


if __name__ == "__main__":
    main(sys.argv[1])
