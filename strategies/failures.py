"""The part of the strategy that adds to each rank's error which rank failed first, and with what error.

If one rank fails, the others see a lost connection, which says nothing of the cause.  Where the layers of the module
have a `Guard`, its advice is added to the error too.
"""

from __future__ import annotations

import signal
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING

import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_longnet.callbacks.preemption import Requeued
from lightning_longnet.layers.attending import guards_of
from lightning_longnet.strategies.launcher import WatchedLauncher, launcher_has_ended
from lightning_longnet.strategies.phases import MarkedPhases
from lightning_longnet.strategies.reports import PATIENCE, FailureReports, await_condition
from lightning_longnet.supervision.processes import STOPPED, state_of
from lightning_longnet.supervision.record import DISCONNECTED, ENDED, FAILED, OUTSIDE, RUNS, place_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_RUNS = [0]  # how many runs this process has set up, as all ranks have: each run has its own failures
_LOST = (  # messages of gloo, NCCL and torch's store where another rank has ended or does not answer
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL"),
    *("Application timeout caused pair closure", "wait timeout", "Timed out after", "failed to recv", "recvValue"),
    *("Connect timeout", "connectFullMesh", "Connection refused", "Socket closed"),
)


class NamedFailures(MarkedPhases):
    """Adds to each error the rank, the phase and the step, and to a lost connection the rank that failed first.

    It reads what other ranks report from when they are connected until `teardown`.
    """

    _reports: FailureReports | None = None  # while the ranks of a run are connected

    def setup(self, trainer: Trainer) -> None:
        """Clear the outcome of an earlier run of this process, for a supervisor, and set the run up.

        The Trainer calls it on all ranks, through `SplitSteps.setup`.
        """
        self._end_run("", RUNS)
        super().setup(trainer)

    def _begin_reports(self) -> None:
        """Begin to read what other ranks report; `SplitSteps._make_context` calls it when the ranks are connected.

        It does nothing in a run of one rank.
        """
        _RUNS[0] += 1
        self._end_reports()
        if dist.is_initialized() and self._ranks() > 1 and dist.get_backend() != "fake":
            self._reports = FailureReports(_RUNS[0], self.global_rank, self._ranks())

    def _end_reports(self) -> None:
        """End the thread that reads what other ranks report, where there is one."""
        reports, self._reports = self._reports, None
        if reports is not None:
            reports.end()

    def teardown(self) -> None:
        """Stop reading what other ranks report; the Trainer calls it when a run has ended, also with an error."""
        self._end_reports()
        super().teardown()

    def on_exception(self, exception: BaseException) -> None:
        """Add to an error which rank raised it, in which phase and step, and which rank failed first.

        Lightning calls it on the rank that raised the error, for each error and for Ctrl-C, before `teardown`.  The
        error is also reported to the other ranks, and written as the outcome of the run for a supervisor.
        """
        super().on_exception(exception)
        if isinstance(exception, Requeued) or self.progress.phase == OUTSIDE:
            self._end_run(str(exception), ENDED)
            return
        where = f"rank {self.global_rank} of {self._ranks()}, {place_of(self.progress.phase, self.progress.step)}"
        text = _text(exception)
        if isinstance(exception, SystemExit) and not isinstance(exception, SIGTERMException) and not exception.code:
            exception.code = 1  # a rank that ends in the middle of a run has failed
        is_lost = is_lost_connection(exception)
        advice = self._advise(exception, f"{where}: {text}", is_lost)
        reported = self._reported_failure(f"{where}: {text}" + f". {advice}" * bool(advice), is_lost)
        # the failure of another rank: what it reported, or what its process shows
        first = reported or (self._evidence() if is_lost else "")
        cause = f"lost its connection, {first}" if first and is_lost else text
        self._end_run(cause, DISCONNECTED if is_lost else FAILED)
        if self._ranks() == 1 and not isinstance(exception, SystemExit):
            return
        line = f"{where}: {text}"
        if first and is_lost and reported:
            # where this rank waited explains nothing, and its stack would stand between the user and the error's own
            exception.__traceback__ = None
        if first and is_lost:
            line = f"{where} stopped because another rank failed first: {first}"
        elif first and text not in first:
            line += f"; before it, {first}"
        if isinstance(exception, (SystemExit, KeyboardInterrupt)):  # Python shows these without notes
            print(line, file=sys.stderr, flush=True)  # noqa: T201
        else:
            exception.add_note(line)

    def _advise(self, exception: BaseException, description: str, is_lost: bool) -> str:
        """Add the advice of the module's `Guard` to an error as a note, and return it; "" if there is none.

        Args:
            exception: the error.
            description: the rank, the phase and the message, for the log of the guard.
            is_lost: whether the error is a lost connection.
        """
        guards = [] if self.lightning_module is None else guards_of(self.lightning_module)
        return guards[0].advise(exception, description, is_lost=is_lost) if guards else ""

    def _ranks(self) -> int:
        """Return the number of ranks; `SequenceRanks` defines it for the strategy, and this one is never called."""
        raise NotImplementedError

    def _reported_failure(self, own: str, is_lost: bool) -> str:
        """Return the failure that another rank reported first; "" if none did within a few seconds.

        Unless this rank's error is a lost connection, it is reported to the others, who read it if it is the first.

        Args:
            own: the failure of this rank, as text.
            is_lost: whether it is a lost connection.
        """
        reports = self._reports
        if reports is None:
            return ""
        # a thread, as the process that holds the store may stand still, and nothing limits that wait
        exchange = partial(_exchange, reports, own, is_lost, self.is_global_zero)
        thread = threading.Thread(target=exchange, daemon=True)
        thread.start()
        thread.join((1 + self.is_global_zero) * PATIENCE + 1.0)
        return reports.text if reports.text != own else ""

    def _evidence(self) -> str:
        """Return what this rank sees of a rank that failed without a report, for the error of a lost connection.

        A rank that has started the others knows how their processes ended, or that one stands still; the others know
        whether the process that started them has ended.
        """
        launcher = self.launcher
        if isinstance(launcher, WatchedLauncher) and launcher.procs:
            await_condition(lambda: any(each.poll() for each in launcher.procs), 1.0)
            first = self.global_rank + 1
            for rank, process in enumerate(launcher.procs, first):
                if process.poll() is not None:
                    code = process.returncode
                    ending = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
                    return f"rank {rank} {ending} and reported no error"
                if state_of(process.pid) == STOPPED:
                    return f"rank {rank} was stopped by a signal (state T)"
        if launcher_has_ended():
            return f"rank {self.global_rank - self.local_rank}, which started this one, has ended and reported no error"
        return "none reported an error, so one stands still or was killed"


def is_lost_connection(exception: BaseException) -> bool:
    """Return whether an error says only that another rank has ended or did not answer in time, by its known texts."""
    if isinstance(exception, dist.DistError):
        return True
    return isinstance(exception, RuntimeError) and any(each in str(exception) for each in _LOST)


def _exchange(reports: FailureReports, own: str, is_lost: bool, holds_store: bool) -> None:
    """Report this rank's failure to the others, or wait for a report of another rank; the target of a thread.

    The rank that holds the store then waits until all have read the report, as the store ends with its process.

    Args:
        reports: the reports of the run; its `text` is the first failure afterwards.
        own: the failure of this rank.
        is_lost: whether it is a lost connection, which is not reported.
        holds_store: whether this is rank 0.
    """
    try:
        if not is_lost:
            reports.report(own)
        elif not reports.text:
            await_condition(lambda: bool(reports.read()), PATIENCE)
        if holds_store and reports.text:
            reports.await_readers()
    except RuntimeError:  # the store has ended with the rank that held it
        return


def _text(exception: BaseException) -> str:
    """Return an error as one line of at most 1000 characters: its type and its message, or what ended the process."""
    if isinstance(exception, SIGTERMException):  # the callback Preemption knows which rank received it
        return ", ".join(("ended by SIGTERM", *getattr(exception, "__notes__", ())))
    if isinstance(exception, SystemExit):
        return f"sys.exit({exception.code!r}) before the run had ended"
    words = " ".join(str(exception).split())
    return f"{type(exception).__name__}: {words}"[:1000] if words else type(exception).__name__
