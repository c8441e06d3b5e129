"""Threads that compute the tasks of one call side by side, each with one thread of torch's operators.

An operator that runs in several threads waits for all of them at its end, and so for a core that another process keeps
busy.  These threads meet once in a call: each takes the next task as soon as it has finished one.
"""

from __future__ import annotations

import os
from collections import deque
from functools import lru_cache
from queue import SimpleQueue
from threading import Lock, Thread, local
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_longnet.attention.kernels.products import routed_products

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_T = TypeVar("_T")


def available(device: torch.device) -> int:
    """Return the number of threads that tasks on a device run in; 1 where the caller must compute them itself.

    It does so on a GPU, and within a dispatch mode, which sees only the operators of its thread.  `forward_blocks` and
    `backward_blocks` ask, and `_line_call`, whose plan depends on it.
    """
    threads = torch.get_num_threads()
    if threads == 1 or device.type != "cpu" or _get_current_dispatch_mode() is not None or not _has_own_limits():
        return 1
    return threads


class _Here(local):
    """Whether this thread is one of the pool."""

    is_in_pool = False


_here = _Here()


def shares_caches() -> bool:
    """Return whether this thread computes beside others of the pool, with which it shares the caches of the CPU.

    `_is_tiled` of the kernel "sdpa" asks.
    """
    return _here.is_in_pool


class Steps(Protocol):
    """The steps of a task, which end early if another task has failed or the caller is interrupted."""

    def __call__(self, items: Iterable[_T]) -> Iterator[_T]:
        """Yield the items until the task is to end."""


def all_steps(items: Iterable[_T]) -> Iterator[_T]:
    """Yield all items: the `Steps` of a call that has no threads."""
    yield from items


def run(function: Callable[[_T, Steps], None], tasks: Iterable[_T], threads: int) -> None:
    """Call a function with each task, in this many threads; an error ends the other tasks, too, and is raised here.

    The function also gets a `Steps`, through which it takes the parts of its task one by one.  `forward_blocks` and
    `backward_blocks` call it.
    """
    work = _Work(function, tasks)
    # for all tasks alike, whether or not their calls overlap with those of another task that is large enough for it
    with routed_products():
        try:
            _pool.start(work, threads)
            work.wait(threads)
        except BaseException:  # an interrupt: a thread that computes while the process ends would abort it
            work.stop()
            work.await_running()
            raise


class _Work:
    """The tasks of one call that no thread has begun, and the outcomes of the threads."""

    def __init__(self, function: Callable[[Any, Steps], None], tasks: Iterable[Any]) -> None:
        self._function, self._tasks, self._is_stopped = function, deque(tasks), False
        self._outcomes: SimpleQueue[BaseException | None] = SimpleQueue()
        self._running: list[None] = []  # an entry for each thread that computes
        self._is_inference = torch.is_inference_mode_enabled()

    def run(self) -> None:
        """Run tasks until none is left, as each thread of the pool does."""
        outcome: BaseException | None = None
        self._running.append(None)
        try:
            # a new thread has the modes of torch's defaults, not those of the caller
            with torch.inference_mode() if self._is_inference else torch.no_grad():
                while self._tasks:
                    self._run_next()
        except BaseException as error:  # noqa: BLE001  the caller raises it
            self.stop()
            outcome = error
        self._running.pop()
        self._outcomes.put(outcome)

    def _run_next(self) -> None:
        """Run the next task, if another thread has not taken the last one."""
        try:
            task = self._tasks.popleft()
        except IndexError:  # another thread has taken the last one
            return
        self._function(task, self._steps)

    def _steps(self, items: Iterable[_T]) -> Iterator[_T]:
        """Yield the items until the work is stopped; the function of a task gets it as its `Steps`."""
        for item in items:
            if self._is_stopped:
                return
            yield item

    def wait(self, threads: int) -> None:
        """Wait for the outcomes of the threads, and raise the first error among them."""
        outcomes = [self._outcomes.get() for _ in range(threads)]
        errors = [error for error in outcomes if error is not None]
        try:
            if errors:
                raise errors[0]
        finally:  # the tracebacks of errors hold this frame
            outcomes.clear()
            errors.clear()

    def stop(self) -> None:
        """Begin no further task, and end those that run after their present step."""
        self._is_stopped = True
        self._tasks.clear()

    def await_running(self) -> None:
        """Wait until no thread computes."""
        while self._running:
            self._outcomes.get()


class _Pool:
    """The threads of this process.  They are daemons: the process ends though they wait for work."""

    def __init__(self) -> None:
        self._lock, self._count = Lock(), 0
        self._works: SimpleQueue[_Work] = SimpleQueue()
        self._ready: SimpleQueue[None] = SimpleQueue()

    def start(self, work: _Work, threads: int) -> None:
        """Have this many threads run the tasks of a call."""
        with self._lock:
            while self._count < threads:
                Thread(target=self._serve, name=f"attention-{self._count}", daemon=True).start()
                self._ready.get()  # one at a time: each changes the number of threads for a moment
                self._count += 1
        for _ in range(threads):
            self._works.put(work)

    def _serve(self) -> None:
        """Take works and run their tasks, for as long as the process lives; each thread of the pool runs it."""
        _here.is_in_pool = True
        _limit_to_one_thread()
        self._ready.put(None)
        while True:
            self._works.get().run()


def _limit_to_one_thread() -> None:
    """Have torch's operators run in one thread where this thread calls them.

    Torch also takes the number as that of threads that start later: it is set back from a thread that ends at once, as
    the caller's own number may be another one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    restoring = Thread(target=torch.set_num_threads, args=(before,))
    restoring.start()
    restoring.join()


@lru_cache(1)
def _has_own_limits() -> bool:
    """Return whether torch keeps the number of threads of its operators for each thread that calls them."""
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()


_pool = _Pool()


def _renew_pool() -> None:
    """Forget the threads of the parent, which a forked process does not have."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_pool)
