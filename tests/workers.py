"""Worker processes of tests over ranks: started once, and given many cases."""

import faulthandler
import multiprocessing
import tempfile
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from signal import SIGABRT, SIGSEGV
from time import monotonic

import pytest

from lightning_longnet.supervision.ports import free_port  # noqa: F401  tests take it from here

PATIENCE = 180  # seconds for one case
CRASHES = []  # what crashed in native code in this process; the first such case is run again, and the summary names it
PRELOADED = ["torch", "torch.distributed", "lightning_longnet.attention", "lightning.pytorch", "lightning.pytorch.cli"]


def forked():
    """Return the context of processes that are forked from a server, which has imported the slow modules."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def answer(pipe, function, *arguments):
    """Run one case in a worker, and send its outcome."""
    try:
        pipe.send((True, function(*arguments)))
    except Exception as error:  # noqa: BLE001  sent to the test, which raises or expects it
        pipe.send((False, (type(error), str(error), traceback.format_exc())))


def started(path, work, *arguments):
    """Run `work` in a worker; where that crashes, the stacks of its threads are in the file."""
    with path.open("w") as file:
        faulthandler.enable(file)
        work(*arguments)


class CrashError(Exception):
    """A worker process ended in the middle of a case."""


class Workers:
    """Processes that run cases together; `run` returns the result of each of the first ones.

    Where a process crashes or does not answer, the case fails, and the next one finds new processes.  The first case of
    a session that SIGABRT or SIGSEGV ends is run again, once, and the summary names it: two sessions ended with
    "free(): invalid pointer" in a worker that had hundreds of sockets and threads open.  Workers of Trainers close
    those after each case now; that this was the cause is likely, and not proven.
    """

    def __init__(self, ranks, work, *arguments):
        """`work(rank, *arguments, pipe)` runs in each of them, and receives cases until there is None."""
        self.ranks, self.work, self.arguments = ranks, work, arguments
        self.start()

    def context(self):
        """Return the context of the processes."""
        return forked()

    def start(self):
        context = self.context()
        self.pipes, self.processes = [], []
        self.stacks = [Path(tempfile.mkstemp(prefix="stacks-")[1]) for _ in range(self.ranks)]
        for rank in range(self.ranks):
            here, there = context.Pipe()
            process = context.Process(
                target=started, args=(self.stacks[rank], self.work, rank, *self.arguments, there), daemon=True
            )
            process.start()
            there.close()  # so that the end of the process is the end of the pipe
            self.pipes.append(here)
            self.processes.append(process)

    def case(self, world, function, arguments):
        """Return the case as it is sent to each worker."""
        return function, world, arguments

    def outcomes(self, world, function, *arguments):
        """Return for each rank (True, result), or (False, (type, message, traceback)) of its error."""
        try:
            return self.attempt(world, function, *arguments)
        except CrashError as crash:
            code, message = crash.args
            CRASHES.append(message)
            if len(CRASHES) > 1 or code not in (-SIGABRT, -SIGSEGV):
                pytest.fail(message)
        return self.attempt(world, function, *arguments)

    def attempt(self, world, function, *arguments):
        if codes := {rank: each.exitcode for rank, each in enumerate(self.processes) if not each.is_alive()}:
            CRASHES.append(f"ranks ended after a case, with exit codes {codes}")
            self.restart()
        case = self.case(world, function, arguments)
        for pipe in self.pipes[:world]:
            pipe.send(case)
        outcomes_by_rank = {}
        deadline = monotonic() + PATIENCE
        while len(outcomes_by_rank) < world:
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes[:world]) if rank not in outcomes_by_rank}
            ready = wait(waiting, max(0, deadline - monotonic()))
            if not ready:
                self.restart()
                pytest.fail(f"no answer from ranks {sorted(waiting.values())} of {world} in {PATIENCE} s")
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    outcomes_by_rank[rank] = pipe.recv()
                except EOFError:
                    process = self.processes[rank]
                    process.join(10)
                    code = process.exitcode
                    stacks = self.stacks[rank].read_text()
                    self.restart()
                    raise CrashError(code, f"rank {rank} of {world} ended with exit code {code}:\n{stacks}") from None
        return [outcomes_by_rank[rank] for rank in range(world)]

    def run(self, world, function, *arguments):
        outcomes = self.outcomes(world, function, *arguments)
        for rank, (is_result, value) in enumerate(outcomes):
            assert is_result, f"rank {rank} of {world} failed:\n{value[2]}"
        return [value for _, value in outcomes]

    def restart(self):
        self.close(kill=True)
        self.start()

    def close(self, kill=False):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if kill:
                process.kill()
            elif process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        for path in self.stacks:
            path.unlink()
