"""Work in parts, each a process whose result is written when it ends, so that a run that was stopped goes on.

`make test-full` and `make gpu` run in this way.  It needs the standard library alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from contextlib import closing
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

ELSEWHERE = [":(top)", ":(top,exclude)benchmarks/results"]  # a result that is committed changes nothing that is tested


class Ended(NamedTuple):
    """The end of a process.

    Attributes:
        status: "passed", "failed", or "no end in N s".
        output: what it wrote to its standard output and error.
        seconds: how long it ran.
        date: when it began.
    """

    status: str
    output: str
    seconds: float
    date: str

    @property
    def is_cut(self) -> bool:
        """Whether the process was ended because its time was up."""
        return self.status.startswith("no end")


class Process:
    """A process that runs a command in a folder, in a session of its own, until it is closed."""

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._begin, self._date = perf_counter(), datetime.now(UTC)
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115, `close` closes it
        self._process = subprocess.Popen(
            command, stdout=self._output, stderr=subprocess.STDOUT, cwd=folder, env=environment, start_new_session=True
        )

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return perf_counter() - self._begin

    def end(self, timeout: float, wait: float = float("inf")) -> Ended | None:
        """Return how it ended, and end it where it has run for `timeout` seconds.

        Returns None if it still runs after the next `wait` seconds.
        """
        remaining = max(0.0, timeout - self.seconds)
        try:
            status = "failed" if self._process.wait(min(wait, remaining)) else "passed"
        except subprocess.TimeoutExpired:
            if wait < remaining:
                return None
            status = f"no end in {timeout:.0f} s"
        self._kill()
        self._output.seek(0)
        text = self._output.read()
        return Ended(status, text, round(self.seconds, 1), self._date.isoformat(timespec="seconds"))

    def close(self) -> None:
        """Kill it and its children if it still runs, and drop its output."""
        self._kill()
        self._output.close()

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def ended(command: Sequence[str], timeout: float, folder: Path, environment: Mapping[str, str] | None = None) -> Ended:
    """Run a command in a folder, and end it and its children where it takes longer than `timeout` seconds."""
    with closing(Process(command, folder, environment)) as process:
        end = process.end(timeout)
    assert end is not None
    return end


def result_of(output: str) -> Any:
    """Return the last line of an output that is a JSON object: libraries may write lines after it."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    raise ValueError(f"no line of JSON in {output[-300:]!r}")


def counts(report: Path) -> dict[str, Any]:
    """Return how many tests passed, failed or were skipped by a report of pytest, their notes, and which failed."""
    if not report.exists():
        return {"passed": 0, "failed": 0, "skipped": 0}
    cases = list(ET.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    found: dict[str, Any] = {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
    }
    notes = [each.get("value") for case in cases for each in case.iter("property") if each.get("name") == "note"]
    found |= {"notes": notes} if notes else {}
    return found | ({"failures": [case.get("name") for case in failed]} if failed else {})


def commit_of(folder: Path) -> str | None:
    """Return the last commit that changed more than a result, or None where something is not committed."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words, "--", *ELSEWHERE], capture_output=True, text=True, cwd=folder)

    try:
        changes = git("status", "--porcelain")
    except FileNotFoundError:  # a copy of the files, on a machine without git
        return None
    if changes.returncode or changes.stdout.strip():
        return None
    return git("log", "-1", "--format=%H").stdout.strip() or None


def commits_since(commit: str | None, folder: Path) -> int | None:
    """Return how many later commits changed more than a result, or None where HEAD does not descend from the commit."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=folder)

    if commit is None or git("merge-base", "--is-ancestor", commit, "HEAD").returncode:
        return None
    return int(git("rev-list", "--count", f"{commit}..HEAD", "--", *ELSEWHERE).stdout)


def digest_of(root: Path, folders: Iterable[str]) -> str:
    """Return a digest of the Python files in these folders, which also stands where git knows nothing."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the version of each package, None of one that is not installed."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def write(path: Path, values: Any) -> None:
    """Write JSON under a name that holds either the former or the new text, whenever the process is ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    half.write_text(json.dumps(values, indent=1) + "\n")
    half.replace(path)
