"""The error that a rank reports to the others, in torch's key-value store, which the process of rank 0 holds.

The store ends with the process of rank 0, and a rank that waits in a collective learns of an error only when the
processes of other ranks end. So each rank reads reports in a thread, and rank 0 waits at its end until all have read,
for `PATIENCE` seconds at most.
"""

from __future__ import annotations

import atexit
import threading
import time
from typing import TYPE_CHECKING, Any

from torch.distributed.distributed_c10d import _get_default_store

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 3.0  # seconds for the store, and for what others write there
_PERIOD = 0.5  # seconds between two looks at the store


class FailureReports:
    """The first error of a run, as the ranks report it to each other.

    `NamedFailures` makes one on each rank when the ranks are connected.  It keeps the store, so that a program may
    destroy its process groups while the thread runs.

    Args:
        run: the number of the run in this process, the same on all ranks, as each run has a key of its own.
        rank, ranks: the number of this rank, and how many there are.

    Attributes:
        text: the error that was reported first; "" until this rank has read one.
    """

    def __init__(self, run: int, rank: int, ranks: int) -> None:
        self.text = ""
        self._key, self._ranks = f"lightning_longnet/failure/{run}", ranks
        self._readers_key = f"{self._key}/readers"  # of the number of ranks that know the error
        self._store: Any = _get_default_store()
        self._lock = threading.Lock()  # this rank is one reader, whichever thread reads
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="failure-reports", daemon=True)
        if rank > 0:
            atexit.register(self.end)  # an error in a callback's own `on_exception` or `teardown` skips the strategy's
            self._thread.start()

    def read(self) -> str:
        """Return the error that was reported first; "" if there is none yet.  It does not wait for one.

        The thread of each rank but rank 0 calls it, and `_exchange` of failures.py after a lost connection.
        """
        with self._lock:
            if not self.text and self._store.check([self._key]):
                self._keep(self._store.get(self._key))
        return self.text

    def report(self, own: str) -> str:
        """Report the error of this rank, unless one was reported before, and return the first.

        `_exchange` of failures.py calls it when this rank's run has failed, unless by a lost connection.
        """
        with self._lock:
            if not self.text:
                self._keep(self._store.compare_set(self._key, "", own))
        return self.text

    def await_readers(self) -> None:
        """Wait until all ranks know the error, for `PATIENCE` seconds at most; `_exchange` calls it on rank 0."""
        # to add 0 reads the number, also before another rank has added to it
        await_condition(lambda: self._store.add(self._readers_key, 0) >= self._ranks, PATIENCE)

    def end(self) -> None:
        """End the thread, at the end of a run (`NamedFailures.teardown`) or of the process.

        A thread that is in the store while the interpreter shuts down would abort the process.  It may wait for the
        thread, `PATIENCE` seconds at most.
        """
        atexit.unregister(self.end)
        self._ends.set()
        if self._thread.is_alive():
            self._thread.join(PATIENCE)

    def _keep(self, text: bytes) -> None:
        """Keep the first error, and count this rank among those that know it; `read` and `report` call it once."""
        self.text = text.decode()
        self._store.add(self._readers_key, 1)

    def _listen(self) -> None:
        """Read until there is an error or the run ends; the target of the thread, which each rank but rank 0 has."""
        try:
            while not self._ends.wait(_PERIOD) and not self.read():
                pass
        except RuntimeError:  # the store has ended with the rank that held it
            return


def await_condition(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition holds, for `seconds` at most, and return whether it does.

    `_exchange` of failures.py waits with it for the report of another rank, `FailureReports.await_readers` for all
    readers, and `NamedFailures._evidence` for the end of a process.
    """
    limit = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < limit:
        time.sleep(0.05)
    return holds
