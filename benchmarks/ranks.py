"""Several ranks on this machine, each a process of one thread, and what rank 0 found."""

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


def on_ranks(ranks: int, work: Callable[..., Any], *told: Any) -> Any:
    """`work(*told)` on each of them; what it gives back on rank 0, in JSON's types.

    They are to Lightning what a launcher has started, and quiet.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        spawn(_begin, (ranks, port, path, work, told), nprocs=ranks)
        return json.loads(path.read_text())


def _begin(rank: int, ranks: int, port: int, path: Path, work: Callable[..., Any], told: tuple[Any, ...]) -> None:
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
    found = work(*told)
    if rank == 0:
        path.write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another still waits for him
        dist.destroy_process_group()
