"""Test and measure this package on a CUDA device, unattended, in calls that go on where the last one stopped.

    python benchmarks/gpu.py                   # all of it
    python benchmarks/gpu.py --minutes 9       # ends in time for a limit of ten minutes; call it again to go on
    python benchmarks/gpu.py --list            # the units, with what came of each
    python benchmarks/gpu.py --figures         # the committed results as the pages show them; needs no GPU

In this order: a check of the machine, the exactness of every kernel and, on several GPUs, of every exchange over NCCL,
compute-sanitizer where it is installed, attention beside its peers, training steps, and the shares of the peak that
longnet plan reads.  Each unit is a process, and is recorded when it ends.  The record names its device and versions:
those of another machine are another file.

The exit status is 0 if every unit passed, 1 if one did not or the machine cannot run this, and 75 if units are left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NoReturn

import gpu_figures
from gpu_units import Unit, units
from resumed import commit_of, counts, digest_of, ended, result_of, write

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
SHARES = ROOT / "lightning_longnet/planning/shares.json"
SOURCES = ("lightning_longnet", "strategies", "benchmarks", "tests/gpu")
ISSUES = "https://github.com/lightning-longnet/lightning-longnet/issues"
LEFT = 75  # the exit status of a program that is to be called again
_CHECK_SECONDS = 300.0
_KEPT = 4000  # characters of a failed unit's output


@dataclass
class Record:
    """The record of a run, which is written after each unit.

    Attributes:
        path: the file.
        machine: the device and versions.
        source: the digest of the sources, of which a unit that ended is not run again.
        commit: their commit, or None where something is not committed.
        units: what came of each unit.
    """

    path: Path
    machine: dict[str, Any]
    source: str
    commit: str | None
    units: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def opened(cls, folder: Path, machine: dict[str, Any]) -> Record:
        """Return the record of this machine, with what it holds already."""
        path = folder / record_name(machine)
        kept = json.loads(path.read_text()) if path.exists() else {"machine": machine, "units": {}}
        if kept["machine"] != machine:
            raise ValueError(f"{path} holds the results of another machine")
        return cls(path, machine, digest_of(ROOT, SOURCES), commit_of(ROOT), kept["units"])

    def status(self, name: str) -> str | None:
        """Return what came of a unit with these sources, or None."""
        row = self.units.get(name)
        return row["status"] if row is not None and row["source"] == self.source else None

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Write what came of a unit."""
        self.units[name] = row | {"commit": self.commit, "source": self.source}
        write(self.path, {"machine": self.machine, "units": self.units})


def record_name(machine: dict[str, Any]) -> str:
    """Return the name of a machine's record: it differs if the device, the number of GPUs or a version does."""
    device = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower().removeprefix("nvidia ")).strip("-")
    digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:8]
    return f"gpu-{device}-x{machine['gpus']}-{digest}.json"


def check() -> dict[str, Any]:
    """Return the machine, its kernels and tools; or only `refusal`, why it cannot run this."""
    end = ended([sys.executable, str(ROOT / "benchmarks/gpu_check.py")], _CHECK_SECONDS, ROOT, environment())
    try:
        answer: dict[str, Any] = result_of(end.output)
    except ValueError:
        last = next(reversed(end.output.strip().splitlines()), "no output")
        return {"refusal": f"the check of the machine ended as {end.status!r}: {last}"}
    return answer


def environment() -> dict[str, str]:
    """Return the environment of a unit, which imports the package of this checkout."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(all_units: Iterable[Unit], record: Record, seconds: float) -> bool:
    """Run the units that the record does not hold, as far as the time goes, and return whether none is left.

    A unit that the end of the call cuts off is run again by the next call, unless it had the whole call: it would
    never end.
    """
    end_at = perf_counter() + seconds
    is_first = True
    for unit in all_units:
        if record.status(unit.name) is not None:
            continue
        if missing := [name for name in unit.needs if record.status(name) not in (None, "passed")]:
            record.add(unit.name, {"kind": unit.kind, "status": f"left out: {missing[0]} did not pass"})
            continue
        left = end_at - perf_counter()
        if left < unit.least and not is_first:
            return False
        row = measured(unit, min(left, unit.timeout))
        if row["status"].startswith("no end") and left < unit.timeout and not is_first:
            return False
        is_first = False
        record.add(unit.name, row)
        print(line(unit.name, row), flush=True)
    return True


def measured(unit: Unit, timeout: float) -> dict[str, Any]:
    """Run a unit, and return what is recorded of it."""
    with tempfile.TemporaryDirectory() as scratch:
        report, command = Path(scratch) / "report.xml", list(unit.command)
        if unit.kind == "exactness":
            command += [f"--junitxml={report}", "-o", "junit_family=xunit1"]
        end = ended(command, timeout, ROOT, environment())
        row: dict[str, Any] = {"kind": unit.kind, "status": end.status, "seconds": end.seconds, "date": end.date}
        if unit.kind == "exactness":
            row |= counts(report)
    if end.status != "passed":
        row["output"] = end.output[-_KEPT:]
    elif unit.kind == "exchange":
        row["output"] = end.output.strip().splitlines()[-8:]
    elif unit.kind not in ("exactness", "sanitizer"):
        row["result"] = result_of(end.output)
    return row


def line(name: str, row: dict[str, Any]) -> str:
    """Return a line about a unit, and the last one that it wrote where it failed."""
    seconds = f"{row['seconds']:8.1f} s" if "seconds" in row else " " * 10
    told = f"{name:70} {seconds}  {row['status']}"
    if row["status"] == "failed":
        told += "".join(f"\n    {text}" for text in row["output"].strip().splitlines()[-1:])
    return told


def finish(record: Record, shares: Path) -> None:
    """Draw the plots, and write the shares of the peak where longnet plan reads them."""
    if find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
    else:
        gpu_figures.draw(record.path)
    row = record.units.get("shares of the peak", {})
    if "result" in row:
        name = row["result"]["device"]
        kept = json.loads(shares.read_text()) if shares.exists() else {}
        write(shares, dict(sorted((kept | {name: row["result"] | {"date": row["date"]}}).items())))
        print(f"longnet plan reads the shares of {name} from {shares}")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end this call before so many minutes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the record and its plots")
    parser.add_argument("--shares", type=Path, default=SHARES, help="the file that longnet plan reads")
    parser.add_argument("--again", action="store_true", help="run the units again that did not pass")
    parser.add_argument("--list", action="store_true", help="print the units and what came of each, run nothing")
    parser.add_argument("--figures", action="store_true", help="print the figures of all results at --out, run nothing")
    options = parser.parse_args(words)
    if not options.minutes > 0:
        parser.error(f"--minutes must be more than 0, got {options.minutes:g}")
    if options.figures:
        print(gpu_figures.figures(options.out))
        return 0
    seconds, begin = 60 * options.minutes, perf_counter()
    signal.signal(signal.SIGTERM, _stopped)  # a unit is ended with this process
    answer = check()
    if answer["refusal"]:
        sent = f"send this line and the output of nvidia-smi to {ISSUES}"
        print(f"make gpu: {answer['refusal']}; if that is wrong, {sent}")
        return 1
    record = Record.opened(options.out, answer["machine"])
    if options.again:
        record.units = {name: row for name, row in record.units.items() if row["status"] == "passed"}
    planned = units(answer)
    if options.list:
        print("\n".join(f"{unit.name:70} {record.status(unit.name) or 'to be run'}" for unit in planned))
        return 0
    _announce(answer, record)
    is_done = run(planned, record, seconds - (perf_counter() - begin))
    ended_ones = [record.status(unit.name) for unit in planned]
    print(f"{sum(status is not None for status in ended_ones)} of {len(planned)} units have ended, in {record.path}")
    if not is_done:
        print("call this again to go on")
        return LEFT
    finish(record, options.shares)
    bad = [unit.name for unit in planned if record.status(unit.name) != "passed"]
    print(f"send {record.path} to {ISSUES}" + (f"; not passed: {', '.join(bad)}" if bad else ""))
    return int(bool(bad))


def _announce(answer: dict[str, Any], record: Record) -> None:
    machine = answer["machine"]
    print(f"{machine['gpus']} x {machine['gpu']}, torch {machine['versions']['torch']}")
    for kernel, reasons in answer["kernels"].items():
        print(f"  {kernel:10} {'; '.join(reasons) or 'serves'}")
    if answer["sanitizer"] is None:
        print("  compute-sanitizer is not installed: memory is not checked")
    print(f"  {len(record.units)} units are recorded in {record.path}", flush=True)


def _stopped(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
