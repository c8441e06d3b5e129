"""The memory that a rank may fill: what is free now, and what there is at most."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
_NO_LIMIT = 2**60  # cgroups of version 1 have a number where they have no limit


class Room(NamedTuple):
    """The bytes of a rank: those that it holds already or can get now, and those that it can get at most."""

    free: float
    total: float


def room_of(device: torch.device, ranks: int) -> Room | None:
    """Return the room of a rank on its device; None where it is not known.

    Args:
        device: a CUDA device, or the CPU.
        ranks: how many ranks this machine's CPU has, which share its memory.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Room(free + torch.cuda.memory_reserved(device), total)
    return host_room(ranks) if device.type == "cpu" else None


def host_room(ranks: int, proc: Path = _PROC, cgroup: Path = _CGROUP) -> Room | None:
    """Return the room of each of so many ranks in the memory of the host, or in that of its control group.

    Swap counts to what there is at most: a run that needs it is slow, and may still be meant.
    """
    meminfo = _values(proc / "meminfo")
    if not {"MemTotal", "MemAvailable"} <= set(meminfo):
        return None
    free, total = meminfo["MemAvailable"], meminfo["MemTotal"]
    for limit, used in _limits(proc, cgroup):
        total, free = min(total, limit), min(free, max(limit - used, 0))
    own = _values(proc / "self/status").get("VmRSS", 0)
    return Room(free / ranks + own, (total + meminfo.get("SwapTotal", 0)) / ranks)


def _values(path: Path) -> dict[str, int]:
    """Return the values of a file of lines such as `MemTotal: 12 kB`, in bytes."""
    if not path.is_file():
        return {}
    words = (line.split() for line in path.read_text().splitlines())
    return {each[0].rstrip(":"): int(each[1]) * 1024 for each in words if len(each) == 3 and each[2] == "kB"}


def _limits(proc: Path, cgroup: Path) -> list[tuple[int, int]]:
    """Return (limit, used) of the control groups that this process is in and that have a limit."""
    limits = []
    file = proc / "self/cgroup"
    for line in file.read_text().splitlines() if file.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroup, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = cgroup / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # a container shows its own group as the root
        for folder in {root, root / path.strip("/"), *(root / path.strip("/")).parents} - {*root.parents}:
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and used is not None and limit < _NO_LIMIT:
                limits.append((limit, used))
    return limits


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdecimal() else None
