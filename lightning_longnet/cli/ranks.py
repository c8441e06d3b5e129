"""The ranks that torchrun or srun has started for a command which reads a checkpoint."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from datetime import timedelta
from os import environ
from time import sleep
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_longnet.diagnosis.ranks import World
    from lightning_longnet.evaluation.ranks import Ranks

_TIMEOUT = 1800.0  # seconds that a rank waits for another one
_GRACE = 10.0  # seconds in which the first rank says that it has failed, too
_PRINTS = 1.0  # seconds in which it prints why, before torchrun sees that a rank has ended, and ends all


class Place(NamedTuple):
    """The ranks of a command, and the device of this one; None lets the command choose."""

    ranks: Ranks
    device: str | None


def is_first() -> bool:
    """Whether this process is the one of the ranks of torchrun that prints messages."""
    return "TORCHELASTIC_RUN_ID" not in environ or environ.get("RANK", "0") == "0"


def check_alone(command: str) -> None:
    """Raise a ValueError where a launcher has started several processes of a command that would each do all of it."""
    from lightning_longnet.diagnosis.ranks import launched_world

    world = launched_world()
    if world is not None and world.ranks > 1:
        raise ValueError(f"longnet {command} runs in one process: start it without {world.launcher}")


@contextmanager
def launched(device: str | None = None) -> Iterator[Place]:
    """Connect this process to the other ranks of its launcher, and yield its place among them.

    Where all ranks fail, the first one alone raises the error.

    Args:
        device: the device that the user named: "cpu", or "cuda", of which each rank takes its own.
    """
    import torch
    import torch.distributed as dist

    from lightning_longnet.diagnosis.ranks import backend_of, launched_world
    from lightning_longnet.evaluation.ranks import Ranks

    world = launched_world()
    if world is None or world.ranks == 1:
        yield Place(Ranks(), device)
        return
    backend = "gloo" if device not in (None, "cuda") else backend_of(world)
    if backend == "nccl":
        torch.cuda.set_device(world.local_rank)
    rank, wait = world.own[0], timedelta(seconds=_TIMEOUT)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        world.host, world.port, is_master=world.hosts_store, timeout=wait, wait_for_workers=False
    )
    own = dist.PrefixStore(f"longnet/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=own, rank=rank, world_size=world.ranks, timeout=wait)
    try:
        _check(device, backend, world)
        with warnings.catch_warnings():
            if rank:
                warnings.simplefilter("ignore")  # the first rank shows them
            yield Place(
                Ranks.of_all("cuda" if backend == "nccl" else "cpu"),
                f"cuda:{world.local_rank}" if backend == "nccl" else "cpu",
            )
        dist.barrier()  # the store of the first rank is there until all have ended
    except (ValueError, OSError) as error:
        if rank == 0:
            own.set("failed", "1")
            raise
        if _has_failed(own):
            sleep(_PRINTS)
            raise SystemExit(2) from error
        raise
    finally:
        dist.destroy_process_group()


def _check(device: str | None, backend: str, world: World) -> None:
    """Raise a ValueError where ranks cannot compute on a device."""
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda over {world.ranks} ranks, which have a GPU each, got {device}")
    if device == "cuda" and backend == "gloo":
        raise ValueError(f"--device cuda needs a GPU for each of the {world.local_ranks} ranks of this machine")


def _has_failed(store: object) -> bool:
    """Return whether the first rank has said that it failed, or has ended."""
    import torch.distributed as dist

    try:
        store.wait(["failed"], timedelta(seconds=_GRACE))  # type: ignore[attr-defined]
    except dist.DistStoreError:  # the first rank goes on
        return False
    except RuntimeError:  # the connection to the first rank is lost
        return True
    return True
