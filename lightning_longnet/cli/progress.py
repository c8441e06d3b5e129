"""Progress of long commands on stderr, with an estimate of the time that is left."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_DELAY = 1.0  # seconds before a bar appears: what is done sooner needs none
_LINES = 30.0  # seconds between two lines where stderr is no terminal
_LOOKS = 0.2  # seconds between two looks at the size of a file


def bar(total: float | None, name: str, unit: str, **options: Any) -> Any:
    """Return a bar of tqdm, which by default appears after a second and leaves no line behind."""
    settings: dict[str, Any] = {"delay": _DELAY, "leave": False, "dynamic_ncols": True}
    if not sys.stderr.isatty():
        settings["mininterval"] = _LINES
    return tqdm(total=total, desc=name, unit=unit, **settings | options)


@contextmanager
def steps(name: str, unit: str = "step") -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the block runs, and yield what sets it: a function of the steps that are done, and of all."""
    with bar(None, name, unit) as shown:

        def report(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield report


@contextmanager
def written(path: Path, total: int, name: str) -> Iterator[None]:
    """Show how much of a file, or of the files in a folder, has been written while the block runs."""
    ended = Event()

    def watch() -> None:
        while not ended.wait(_LOOKS):
            shown.update(min(size(path), total) - shown.n)

    with bar(total, name, "B", unit_scale=True, unit_divisor=1024) as shown:
        thread = Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def size(path: Path) -> int:
    """Return the bytes of a file or of the files in a folder, 0 where there is none."""
    found = 0
    for each in path.rglob("*") if path.is_dir() else [path]:
        try:
            found += each.stat().st_size
        except FileNotFoundError:  # a temporary file that has got its name meanwhile
            continue
    return found
