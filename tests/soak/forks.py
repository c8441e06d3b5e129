"""Supervised runs whose processes are forks of this one, which has imported everything: a run costs no imports.

This process must have run no backward: autograd's threads would be missing in a fork.
"""

import atexit
import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

from lightning.pytorch.strategies.launchers import subprocess_script

from lightning_longnet.strategies import phases
from lightning_longnet.supervision import stacks, supervisor
from lightning_longnet.supervision.processes import state_of

_SUBREAPER = 36  # of prctl: descendants without a parent become children of this process
_STANDARD = {signal.SIGPIPE: signal.SIG_IGN, signal.SIGINT: signal.default_int_handler}
_DESCRIPTORS = 1024


class ForkedProcess:
    """A process that runs a function, with the interface of `subprocess.Popen` as far as it is needed here."""

    def __init__(self, args, main, env=None, cwd=None, start_new_session=False, output=None):
        self.args, self.returncode, self._lock = args, None, threading.Lock()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run(main, env, cwd, start_new_session, output)

    def poll(self):
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def wait(self, timeout=None):
        limit = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if limit is not None and time.monotonic() > limit:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class _Subprocess:
    """Stands for the module `subprocess` in those that start ranks."""

    TimeoutExpired = subprocess.TimeoutExpired

    def __init__(self, main):
        self.main = main

    def Popen(self, command, env=None, cwd=None, start_new_session=False):  # noqa: N802  the name of the class
        return ForkedProcess(command, self.main, env, cwd, start_new_session)


def supervised(main, words, folder, limits, restarts, environment):
    """Start a supervisor of `main`, which reads `words` in `sys.argv`, and return its process.

    What it and the ranks print is written to `output.txt` in the folder.
    """

    def supervise():
        sys.argv = ["program.py", *words]
        for module in (supervisor, subprocess_script):
            module.subprocess = _Subprocess(main)
        sys.exit(supervisor.Supervisor(sys.argv, limits, restarts).run())

    return ForkedProcess(words, supervise, environment, folder, True, folder / "output.txt")


def launched(main, words, folder, environment):
    """Start `main` without a supervisor, in the same way; Lightning's launcher forks its other ranks."""

    def launch():
        sys.argv = ["program.py", *words]
        subprocess_script.subprocess = _Subprocess(main)
        main()

    return ForkedProcess(words, launch, environment, folder, True, folder / "output.txt")


def _run(main, env, cwd, starts_session, output):
    """Run as a new program, with signals, files and environment of its own, and end the process."""
    status = 1
    try:
        _begin(env, cwd, starts_session, output)
        main()
        status = 0
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        status = -signal.SIGINT
    except BaseException:  # noqa: BLE001  a program that ends with a traceback
        traceback.print_exc()
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        if status < 0:
            signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
    finally:
        os._exit(status & 255)


def _begin(env, cwd, starts_session, output):
    atexit._clear()  # what this process is to do at its end, as removing its folders
    # a rank is forked from the one that launches it, which prints its own stacks to a file of this number
    faulthandler.disable()
    faulthandler.unregister(stacks.SIGNAL)
    phases._STACKS.clear()
    for number in signal.Signals:
        if signal.getsignal(number) not in (signal.SIG_DFL, None):
            signal.signal(number, _STANDARD.get(number, signal.SIG_DFL))
    if starts_session:
        os.setsid()
    if output is not None:
        with open(os.devnull) as nothing, open(output, "a") as file:
            for number, opened in enumerate((nothing, file, file)):
                os.dup2(opened.fileno(), number)
    os.closerange(3, _DESCRIPTORS)
    if cwd is not None:
        os.chdir(cwd)
    if env is not None:
        os.environ.clear()
        os.environ.update(env)


def adopt():
    """Become the parent of processes below this one whose own parent has ended."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


def children():
    """The processes whose parent is this one, those included that have ended."""
    result = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == os.getpid():
            result.add(int(path.parent.name))
    return result


def left(before):
    """The processes that are left of a run, beside the children of before; they are ended."""
    result = []
    while new := children() - before:
        for pid in new:
            if state_of(pid) not in ("Z", ""):
                result.append(pid)
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return result
