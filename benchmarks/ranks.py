"""Several ranks on this machine, each a process of one thread, and the result of rank 0."""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

if TYPE_CHECKING:
    from collections.abc import Callable


def on_ranks(ranks: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """Run `work(*arguments)` on each rank, and return its result on rank 0, which must be JSON.

    Lightning takes the processes for those of a launcher, and logs nothing.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        spawn(_begin, (ranks, port, path, work, arguments), nprocs=ranks)
        return json.loads(path.read_text())


def _begin(rank: int, ranks: int, port: int, path: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(ranks),
    }
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    result = work(*arguments)
    if rank == 0:
        path.write_text(json.dumps(result))
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another still waits for him
        dist.destroy_process_group()
