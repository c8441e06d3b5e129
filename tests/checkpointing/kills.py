"""A kill at one operation on files: SIGKILL in the place of that operation.

Operations are opening for writing, writing, fsync, renaming and removing, of files and folders, below one folder.
"""

import json
import os
import signal
import sys
from pathlib import Path

from workers import forked

from lightning_longnet.checkpointing.streams import SummedFile

EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "os.link"}


class Operations:
    """Counts the operations of this process, and ends it at one of them."""

    def __init__(self):
        self.begin(None)

    def note(self, name, *paths):
        inside = self.folder is not None and any(str(path).startswith(str(self.folder)) for path in paths)
        if not inside:
            return
        operation = f"{name} {Path(paths[0]).name}"
        if name == "write" and self.names[-1] == operation:
            return  # small ones are collected in memory, and written together
        self.names.append(operation)
        if len(self.names) - 1 == self.at:
            if self.mark is not None:
                self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def begin(self, folder, at=None, mark=None):
        """Count from now on; just before the kill, the file `mark`, which lies elsewhere, is made."""
        self.folder, self.names, self.at, self.mark = folder, [], at, mark


OPERATIONS = Operations()
_installed = []


def _hook(event, arguments):
    if OPERATIONS.folder is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, (str, os.PathLike)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            OPERATIONS.note("open", path)
    elif event in EVENTS:
        OPERATIONS.note(event, *(each for each in arguments[:2] if isinstance(each, (str, os.PathLike))))


def install():
    """Let operations be counted from now on; a process does this once."""
    if _installed:
        return
    _installed.append(True)
    sys.addaudithook(_hook)
    fsync, write = os.fsync, SummedFile.write

    def counted_fsync(descriptor):
        OPERATIONS.note("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def counted_write(self, content):
        OPERATIONS.note("write", self._file.name)
        return write(self, content)

    os.fsync, SummedFile.write = counted_fsync, counted_write


def counted(folder, action):
    """The operations of an action below a folder."""
    install()
    OPERATIONS.begin(folder)
    try:
        action(folder)
    finally:
        names = OPERATIONS.names
        OPERATIONS.begin(None)
    return names


def killed_at(folder, number, action):
    """Whether the operation of a number was reached by an action in a process of its own, which it ended by SIGKILL."""
    install()
    child = os.fork()
    if child == 0:
        OPERATIONS.begin(folder, number)
        try:
            action(folder)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def killed_ranks(folder, action, world, victim=0, number=None):
    """Run an action on ranks that are processes, of which SIGKILL ends one at an operation, and then the others.

    Returns the operations of that rank if no number is given, else whether the operation was reached.  The processes
    are not forks of this one, whose threads a backward in a fork would wait for.
    """
    names = folder.with_name(f"{folder.name}-operations.json")
    context = forked()
    ranks = [
        context.Process(target=_rank, args=(folder, action, rank, world, rank == victim, number, names))
        for rank in range(world)
    ]
    for each in ranks:
        each.start()
    ranks[victim].join()
    is_killed = ranks[victim].exitcode == -signal.SIGKILL
    for each in ranks:
        if is_killed:
            each.kill()
        each.join()
    if number is None:
        assert ranks[victim].exitcode == 0
        return json.loads(names.read_text())
    return is_killed


def _rank(folder, action, rank, world, is_victim, number, names):
    install()
    if is_victim:
        OPERATIONS.begin(folder, number)
    action(rank, world, folder)
    if is_victim:
        written = OPERATIONS.names
        OPERATIONS.begin(None)
        names.write_text(json.dumps(written))
