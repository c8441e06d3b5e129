"""Run many small runs that are killed, damaged, resumed or given bad files, and count what held.

    python benchmarks/soak.py --minutes 60        # goes on where it was stopped
    python benchmarks/soak.py --table             # the committed result

The outcome of each cell is appended to a file of JSON lines as soon as it ends.  A cell that held is left out the next
time, unless the code has changed since.  Ranks are forks of this process, which has imported everything, under the
supervisor that users have, with a stall time of 5 seconds: no cell waits for imports.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/soak-cpu.jsonl"
FOLDERS = ("", "soak", "supervision", "checkpointing", "strategies")  # of the tests, whose means the cells use
# what a kind of cells is about, and how many of them there are to be
ROWS = {
    "kills, ddp": "ddp",
    "kills, fsdp2": "fsdp2",
    "kills, deepspeed_stage_2": "DeepSpeed 2",
    "kills, deepspeed_stage_3": "DeepSpeed 3",
}
OTHERS = {
    "faults, ddp": (
        "ddp: 11 faults, first and last rank, 5 phases: ended, status not 0, no process left, rank named",
        110,
    ),
    "faults, fsdp2": ("the same with fsdp2", 110),
    "operations": ("SIGKILL at each file operation of a save, by engine and rank: the old or the new checkpoint", 15),
    "exact": ("resumed on the same ranks: equal bit by bit", 24),
    "elastic": ("resumed on another mesh: equal to a plain loop up to 1e-9", 30),
    "engines": ("resumed with each engine: equal, or an error on all ranks that names what would work", 42),
    "corruptions": ("damaged checkpoints: named and passed over", 40),
    "bad data": ("bad data: an error on all ranks, or announced", 40),
    "hostile files": ("hostile files: nothing ran, nothing outside was read", 60),
}
KILLS = {"kills, ddp": 20, "kills, fsdp2": 30, "kills, deepspeed_stage_2": 25, "kills, deepspeed_stage_3": 25}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def latest(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the last outcome of each cell by kind."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines_of(path):
        if "cell" in line:
            found[line["kind"], json.dumps(line["cell"])] = line
    kinds: dict[str, list[dict[str, Any]]] = {}
    for (kind, _), line in found.items():
        kinds.setdefault(kind, []).append(line)
    return kinds


class Log:
    """The file of outcomes, and what it says of the code as it is."""

    def __init__(self, path: Path, seed: int, any_code: bool) -> None:
        full: Any = importlib.import_module("full")
        self.path, self.seed = path, seed
        self.commit = full.commit_of(ROOT / "tests")
        self.done = {
            (line["kind"], json.dumps(line["cell"]))
            for lines in latest(path).values()
            for line in lines
            if line["held"] and (any_code or (line["commit"] == self.commit is not None)) and line["seed"] == seed
        }
        machine = {"machine": full.machine()}
        if machine not in lines_of(path):
            self._append(machine)

    def has(self, kind: str, cell: Any) -> bool:
        return (kind, json.dumps(cell)) in self.done

    def add(self, kind: str, cell: Any, error: str, seconds: float, shown: dict[str, Any] | None = None) -> None:
        line = {"kind": kind, "cell": cell, "held": not error, **(shown or {}), "seconds": seconds, "seed": self.seed}
        if error:
            line["error"] = error[-3000:]
        self._append({**line, "commit": self.commit, "date": datetime.now(UTC).isoformat(timespec="seconds")})
        print(f"{'held' if not error else 'FAILED':6} {seconds:6.1f} s  {kind}: {cell}", flush=True)

    def _append(self, line: dict[str, Any]) -> None:
        text = json.dumps(line)
        for folder in (ROOT, sys.prefix, tempfile.gettempdir()):  # which are of this machine alone
            text = text.replace(f"{folder}/", "")
        with self.path.open("a") as file:
            file.write(f"{text}\n")


def soak(log: Log, kinds: list[str], minutes: float, only_first: bool) -> None:
    """Run the cells that are missing: first one of each kind, and without those that are tests with `only_first`."""
    cells: Any = importlib.import_module("soak_cells")
    pytest: Any = importlib.import_module("pytest")
    importlib.import_module("forks").adopt()
    importlib.import_module("deepspeed")
    end = monotonic() + 60 * minutes
    rest = [each for each in cells.cells() if each[0] in kinds and not log.has(*each)]
    first = list({kind: (kind, cell) for kind, cell in reversed(rest)}.values())[::-1]
    with tempfile.TemporaryDirectory() as folder:
        runs = cells.Soak(Path(folder), log.seed)
        try:
            for kind, cell in first if only_first else [*first, *(each for each in rest if each not in first)]:
                if monotonic() > end:
                    return
                begin, error, shown = monotonic(), "", None
                try:
                    shown = runs.run(kind, cell)
                except (AssertionError, pytest.fail.Exception) as fault:
                    error = str(fault) or "failed"
                log.add(kind, cell, error, round(monotonic() - begin, 1), shown)
        finally:
            runs.close()
    if only_first:
        return
    counted: Any = importlib.import_module("counted")
    for kind, files in cells.TESTS.items():
        for file, names in files.items():
            if monotonic() > end:
                return
            if kind in kinds and not log.has(f"{kind}, file", file):
                errors = []
                for name, error, seconds in counted.outcomes(file, names):
                    errors += [error] if error else []
                    if name:
                        log.add(kind, [file, name], error, seconds)
                    if monotonic() > end:
                        return
                log.add(f"{kind}, file", file, "\n".join(errors), 0.0)


def table(path: Path) -> str:
    """Return what was run, what held, and what was not run."""
    found = latest(path)
    lines = ["| | held | worst |", "|---|---|---|"]
    for kind, name in ROWS.items():
        runs = found.get(kind, [])
        held = [run for run in runs if run["held"]]
        kills, in_saves = (sum(run[key] for run in held) for key in ("kills", "in_saves"))
        longest = max((run["trains_again_after"] for run in held), default=0.0)
        text = f"SIGKILLs, {name}, {in_saves} of them at a file operation of a save: equal bit by bit"
        count = f"{kills}" if len(held) == len(runs) else f"{kills}; {len(runs) - len(held)} of {len(runs)} runs failed"
        missing = "" if kills >= KILLS[kind] else f" (of {KILLS[kind]}, not all were run)"
        lines.append(f"| {text} | {count}{missing} | trained again after {longest:.0f} s |")
    for kind, (text, planned) in OTHERS.items():
        runs = found.get(kind, [])
        held = [run for run in runs if run["held"]]
        missing = "" if len(runs) >= planned else f" ({planned - len(runs)} more were not run)"
        longest = max((run["ended_after"] for run in held if "ended_after" in run), default=None)
        worst = "" if longest is None else f"ended after {longest:.0f} s"
        count = f"{len(held)} of {len(runs)}{missing}" if runs else f"not run ({planned})"
        lines.append(f"| {text} | {count} | {worst} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [*ROWS, *OTHERS]
    parser.add_argument("--minutes", type=float, default=600, help="begin no cell after this time")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--kinds", nargs="+", choices=names, default=names, help="run these cells alone")
    parser.add_argument("--first", action="store_true", help="run one cell of each kind alone")
    parser.add_argument("--any-code", action="store_true", help="leave out what held with other code, too")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the committed result")
    arguments = parser.parse_args()
    if not arguments.table:
        sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / name) for name in FOLDERS)]
        log = Log(arguments.out, arguments.seed, arguments.any_code)
        soak(log, arguments.kinds, arguments.minutes, arguments.first)
    print(table(arguments.out))
    return int(
        not arguments.table and any(not line["held"] for lines in latest(arguments.out).values() for line in lines)
    )


if __name__ == "__main__":
    sys.exit(main())
