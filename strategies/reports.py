"""The failure that a rank reports to the others, in the store that rank 0 holds.

The store ends with the process of rank 0, and a rank that waits in a collective learns of an error only when the
processes of other ranks end. So each rank reads reports in a thread, and rank 0 does not end before all have read.
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
    """The first failure of a run, as the ranks report it to each other.

    It keeps the store, so that a program may destroy its process groups while the thread runs.

    Attributes:
        text: the failure that was reported first, as far as this rank has read it.
    """

    def __init__(self, run: int, rank: int, ranks: int) -> None:
        self.text = ""
        self._key, self._ranks = f"lightning_longnet/failure/{run}", ranks
        self._store: Any = _get_default_store()
        self._lock = threading.Lock()  # this rank is one reader, whichever thread reads
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="failure-reports", daemon=True)
        if rank > 0:
            atexit.register(self.end)  # an error in a callback's own `on_exception` or `teardown` skips the strategy's
            self._thread.start()

    def read(self) -> str:
        """Return the failure that was reported first, or an empty string where there is none."""
        with self._lock:
            if not self.text and self._store.check([self._key]):
                self._keep(self._store.get(self._key))
        return self.text

    def report(self, own: str) -> str:
        """Report a failure, and return the first one, which is this one where no other was reported before."""
        with self._lock:
            if not self.text:
                self._keep(self._store.compare_set(self._key, "", own))
        return self.text

    def await_readers(self) -> None:
        """Wait until all ranks have read the failure, for `PATIENCE` seconds at most."""
        await_condition(lambda: self._store.add(self._readers, 0) >= self._ranks, PATIENCE)

    def end(self) -> None:
        """End the thread: one that is in the store while the interpreter shuts down would abort the process."""
        atexit.unregister(self.end)
        self._ends.set()
        if self._thread.is_alive():
            self._thread.join(PATIENCE)

    @property
    def _readers(self) -> str:
        return f"{self._key}/readers"

    def _keep(self, text: bytes) -> None:
        self.text = text.decode()
        self._store.add(self._readers, 1)

    def _listen(self) -> None:
        """Read until there is a failure or the run ends: the loop of the thread of each rank but the first."""
        try:
            while not self._ends.wait(_PERIOD) and not self.read():
                pass
        except RuntimeError:  # the store has ended with the rank that held it
            return


def await_condition(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition holds, and return whether it does after so many seconds."""
    limit = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < limit:
        time.sleep(0.05)
    return holds
