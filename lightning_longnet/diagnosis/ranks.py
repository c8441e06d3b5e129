"""The ranks of `longnet doctor`: starting them, waiting for their findings with a timeout, and collecting these."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from lightning_longnet.diagnosis.exactness import EXCHANGES, Finding
from lightning_longnet.diagnosis.rank import Job, connected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PROGRAM = (sys.executable, "-m", "lightning_longnet.diagnosis.rank")
GRACE = 3.0  # seconds in which the others' errors may come, once a rank has failed
_PAUSE = 0.05
_FOUND = 120  # letters of the last line of a rank that ended


class World(NamedTuple):
    """The ranks of a diagnosis, as this process sees them.

    Attributes:
        ranks: how many there are.
        own: the ranks that this process starts.
        local_rank: the number on this machine of the only rank in `own`, if a launcher has started a process for each.
            If `own` has several ranks, their local ranks are their indices in it.
        local_ranks: how many ranks there are on this machine.
        host, port: the address of the store; port 0 takes any free one.
        hosts_store: whether this process opens the store.
        launcher: "torchrun" or "srun", which started this process; "" if neither did.
    """

    ranks: int
    own: tuple[int, ...]
    local_rank: int
    local_ranks: int
    host: str
    port: int
    hosts_store: bool
    launcher: str = ""

    @property
    def reports(self) -> bool:
        """Whether this process collects the answers of all ranks."""
        return 0 in self.own


class Started(NamedTuple):
    """The process of a rank, and the file that it prints to."""

    process: subprocess.Popen[bytes]
    output: Path


class Answers(NamedTuple):
    """The answers of the ranks: the findings of each exchange on all ranks, and a line for each rank that failed."""

    findings: list[list[Finding]]
    failures: list[str]

    @property
    def is_exact(self) -> bool:
        """Whether no rank failed and all findings are within rounding."""
        return not self.failures and all(each.is_exact for ranks in self.findings for each in ranks)


def local_world(ranks: int) -> World:
    """Return the world of `ranks` ranks that this process starts on this machine."""
    return World(ranks, tuple(range(ranks)), 0, ranks, "127.0.0.1", 0, hosts_store=True)


def launched_world() -> World | None:
    """Return the world of the ranks that torchrun or srun has started, of which this process is one; else None."""
    given = os.environ
    if "TORCHELASTIC_RUN_ID" in given:
        rank, ranks = int(given["RANK"]), int(given["WORLD_SIZE"])
        hosts = rank == 0 and given.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        here = int(given["LOCAL_RANK"]), int(given["LOCAL_WORLD_SIZE"])
        return World(ranks, (rank,), *here, given["MASTER_ADDR"], int(given["MASTER_PORT"]), hosts, "torchrun")
    if int(given.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        try:
            slurm = SLURMEnvironment(auto_requeue=False)
        except RuntimeError as error:  # options of srun with which Lightning would not train either
            raise ValueError(str(error)) from error
        rank = int(given["SLURM_PROCID"])
        here = int(given["SLURM_LOCALID"]), -(-int(given["SLURM_STEP_NUM_TASKS"]) // int(given["SLURM_STEP_NUM_NODES"]))
        return World(
            int(given["SLURM_STEP_NUM_TASKS"]), (rank,), *here, slurm.main_address, slurm.main_port, rank == 0, "srun"
        )
    return None


def backend_of(world: World) -> str:
    """Return "nccl" if each rank of this machine has a GPU and torch has NCCL, else "gloo"."""
    has_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= world.local_ranks
    return "nccl" if has_gpus and dist.is_nccl_available() else "gloo"


def ask(
    world: World,
    backend: str,
    timeout: float,
    program: Sequence[str] = PROGRAM,
    report: Callable[[int, int], None] | None = None,
) -> Answers:
    """Start this process's ranks, and return what all ranks answer within `timeout` seconds; `longnet doctor` calls it.

    Only the process that starts rank 0 returns findings.  The others return no failure if those were exact.  All
    processes that were started have ended when it returns.

    Args:
        world: the ranks.
        backend: "gloo" or "nccl".
        timeout: seconds.
        program: the command that runs a rank, to which its `Job` is added as JSON.
        report: called with the number of exchanges that ranks have checked, and of all, in the process of rank 0.
    """
    deadline = time.monotonic() + timeout
    try:
        server = None
        if world.hosts_store:
            wait = timedelta(seconds=timeout)
            server = dist.TCPStore(  # type: ignore[attr-defined]
                world.host, world.port, is_master=True, timeout=wait, wait_for_workers=False
            )
        port = world.port if server is None else server.port
        store = connected(world.host, port, timeout)
    except (RuntimeError, OSError) as error:
        place = f"{world.host}:{world.port}"
        return Answers([], [f"rank {world.own[0]} did not reach rank 0 at {place}: {str(error).splitlines()[0]}"])
    with _started(world, port, backend, timeout, program) as processes:
        if world.reports:
            answers = _collected(world, store, processes, deadline, report)
            store.set("verdict", "exact" if answers.is_exact else "wrong")
            if server is not None and len(world.own) < world.ranks:
                _wait(lambda: all(store.check([f"read/{rank}"]) for rank in range(1, world.ranks)), GRACE)
            return answers
        return _verdict(world, store, processes, deadline)


@contextmanager
def _started(
    world: World, port: int, backend: str, timeout: float, program: Sequence[str]
) -> Iterator[dict[int, Started]]:
    """Start the ranks in `world.own`, yield their processes by rank, and kill those that are left after the block."""
    processes: dict[int, Started] = {}
    # a rank imports the package from where this process imported it
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, map(os.path.abspath, sys.path)))}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for place, rank in enumerate(world.own):
                local_rank = place if len(world.own) > 1 else world.local_rank
                job = Job(
                    rank, world.ranks, local_rank, world.local_ranks, world.host, port, backend, timeout, os.getpid()
                )
                output = Path(folder) / f"{rank}"
                with output.open("wb") as file:
                    command = [*program, json.dumps(job._asdict())]
                    process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
                processes[rank] = Started(process, output)
            yield processes
        finally:
            for process, _ in processes.values():
                process.kill()
            for process, _ in processes.values():
                process.wait()


def _collected(
    world: World,
    store: Any,
    processes: dict[int, Started],
    deadline: float,
    report: Callable[[int, int], None] | None,
) -> Answers:
    """Return the answers of all ranks that come until the deadline, in the process that started rank 0.

    After a rank has failed, the others have `GRACE` seconds.  A rank without an answer counts as failed.
    """
    waiting = set(range(world.ranks))
    answers: dict[int, list[Finding]] = {}
    failures: dict[int, str] = {}
    while waiting and time.monotonic() < deadline:
        for rank in sorted(waiting):
            has_ended = (
                rank in processes and processes[rank].process.poll() is not None
            )  # before its answer is looked for
            if store.check([f"answer/{rank}"]):
                answers[rank] = [Finding(*each) for each in json.loads(store.get(f"answer/{rank}"))]
            elif store.check([f"error/{rank}"]):
                failures[rank] = f"rank {rank} failed {_step(store, rank)}: {store.get(f'error/{rank}').decode()}"
            elif has_ended:
                status = processes[rank].process.returncode
                last = _last_line(processes[rank].output)
                failures[rank] = f"rank {rank} ended with status {status} {_step(store, rank)}{last}"
        waiting -= {*answers, *failures}
        if report is not None:
            done = sum(_checked(store, rank) for rank in waiting) + (world.ranks - len(waiting)) * len(EXCHANGES)
            report(done, world.ranks * len(EXCHANGES))
        if failures:  # the others cannot finish without it
            deadline = min(deadline, time.monotonic() + GRACE)
        time.sleep(_PAUSE)
    silent = [f"rank {rank} gave no answer {_step(store, rank)}" for rank in sorted(waiting)]
    by_exchange = [list(each) for each in zip(*answers.values(), strict=True)]
    return Answers(by_exchange, [*(failures[rank] for rank in sorted(failures)), *silent])


def _verdict(
    world: World,
    store: Any,
    processes: dict[int, Started],
    deadline: float,
) -> Answers:
    """Wait for the verdict of the process that started rank 0, and return it as answers without findings.

    If the rank of this process ends without an answer, its last line is written to the store, for that process.
    """
    (rank,) = world.own
    process, output = processes[rank]
    try:
        while time.monotonic() < deadline + GRACE and not store.check(["verdict"]):
            if process.poll() and not store.check([f"error/{rank}"]):
                store.set(f"error/{rank}", f"ended with status {process.returncode}{_last_line(output)}")
            time.sleep(_PAUSE)
        has_verdict = store.check(["verdict"])
        is_exact = has_verdict and store.get("verdict") == b"exact"
        store.set(f"read/{rank}", "")
    except RuntimeError:  # the store ended with the process that opened it
        has_verdict = is_exact = False
    if is_exact:
        return Answers([], [])
    return Answers([], [] if has_verdict else [f"rank {rank} had no verdict of rank 0"])


def _step(store: Any, rank: int) -> str:
    """Return where a rank is, by what it wrote to the store, for an error message: "in ring", say."""
    if not store.check([f"at/{rank}"]):
        return "before it had started"
    return f"while {step}" if not (step := store.get(f"at/{rank}").decode()).startswith("in ") else step


def _checked(store: Any, rank: int) -> int:
    """Return the number of exchanges that a rank has checked, while it gives no answer yet."""
    name = store.get(f"at/{rank}").decode().removeprefix("in ") if store.check([f"at/{rank}"]) else ""
    return EXCHANGES.index(name) if name in EXCHANGES else 0


def _last_line(output: Path) -> str:
    """Return ": " and the last line that a rank printed; "" if it printed none."""
    lines = output.read_text(errors="replace").strip().splitlines()
    return f": {lines[-1][:_FOUND]}" if lines else ""


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition holds, for `seconds` at most."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(_PAUSE)
