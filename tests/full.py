"""Runs all tests, the matrices and soaks among them, and keeps the outcome of each file: `make test-full`.

Every file runs in a separate process, two of them at a time, and property tests draw ten times as many cases as in
`make test-long`, new ones each time.  This takes hours, which may be spread over several runs and machines: the result
is written after each file, and holds the commit, the date, the machine and the versions of each.  A run leaves out
files that passed at the same commit, on the same machine and with the same versions.  It begins with files without a
result, then takes those with the oldest one.  `--minutes 0` only prints the summary of what was recorded.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections import Counter, deque
from pathlib import Path
from time import monotonic

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["torch", "lightning", "deepspeed", "transformers", "hypothesis", "pytest"]
sys.path.append(str(ROOT / "benchmarks"))
from resumed import Process, commit_of, commits_since, counts, versions, write  # noqa: E402


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="run these files of the folder alone")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", help="the folder of the tests")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/test-full.json")
    parser.add_argument("--timeout", type=float, default=4 * 3600, help="seconds until a file is given up")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no file after these minutes")
    parser.add_argument("--processes", type=int, default=2, help="how many files run at a time")
    parser.add_argument("--behind", type=int, default=100, help="name results that are more than so many commits old")
    parser.add_argument("--again", action="store_true", help="run files that have passed, too")
    arguments = parser.parse_args(words)
    if arguments.processes < 1:
        parser.error(f"--processes must be at least 1, got {arguments.processes}")

    folder = arguments.tests.resolve()
    test_files = sorted(str(path.relative_to(folder)) for path in folder.rglob("test_*.py"))
    chosen = [str(Path(name).resolve().relative_to(folder)) for name in arguments.files] or test_files
    if unknown := set(chosen) - set(test_files):
        parser.error(f"files must be tests in {folder}, got {', '.join(sorted(unknown))}")

    commit, here = commit_of(folder), machine()
    place = digest(here)
    kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    machines = kept.get("machines", {}) | {place: here}
    rows = kept.get("files", {})
    results = {name: row for name, row in rows.items() if name in test_files and row.get("machine") in machines}
    if commit is not None and not arguments.again:
        passed_here = {"commit": commit, "machine": place, "status": "passed"}
        done = [name for name in chosen if passed_here.items() <= results.get(name, {}).items()]
        for name in done:
            print(f"{line(name, results[name])}, before", flush=True)
        chosen = [name for name in chosen if name not in done]
    begin = monotonic()
    waiting = deque(sorted(chosen, key=lambda name: results[name]["date"] if name in results else ""))
    running = []
    try:
        while running or waiting:
            while waiting and len(running) < arguments.processes:
                if monotonic() - begin >= 60 * arguments.minutes:
                    waiting.clear()
                else:
                    running.append(FileRun(folder, waiting.popleft(), arguments.timeout))
            for file in list(running):
                if (row := file.row(wait=0.2)) is None:
                    continue
                running.remove(file)
                results[file.name] = {"commit": commit, "machine": place, **row}
                used = {row["machine"] for row in results.values()}
                named = {key: known for key, known in machines.items() if key in used}
                write(arguments.out, {"machines": named, "files": dict(sorted(results.items()))})
                print(line(file.name, results[file.name]), flush=True)
    finally:
        for file in running:
            file.close()
    ages = {row["commit"]: commits_since(row["commit"], folder) for row in results.values()}
    print(summary(results, test_files, machines, ages, arguments.behind))
    return int(any(results.get(name, {}).get("status") != "passed" for name in test_files))


class FileRun:
    """A run of the tests of a file in a process."""

    def __init__(self, folder, name, timeout):
        self.name, self.timeout = name, timeout
        self.scratch = tempfile.TemporaryDirectory()
        self.report = Path(self.scratch.name) / "report.xml"
        environment = {key: text for key, text in os.environ.items() if key != "CI"}  # which draws the same cases
        command = [sys.executable, "-m", "pytest", str(folder / name), "-q", "--draws", "many", "--no-skips"]
        command += ["-p", "no:cacheprovider", f"--junitxml={self.report}", "-o", "junit_family=xunit1"]
        self.process = Process(command, folder.parent, environment)

    def row(self, wait):
        """Return the counts of its outcomes, or None if it has not ended after the next `wait` seconds."""
        if (end := self.process.end(self.timeout, wait)) is None:
            return None
        if end.status != "passed":
            print(end.output, flush=True)
        row = {"status": end.status, **counts(self.report), "seconds": end.seconds, "date": end.date}
        self.close()
        return row

    def close(self):
        """Kill it if it still runs, and remove its report."""
        self.process.close()
        self.scratch.cleanup()


def machine():
    cpu, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((row.partition(": ")[2] for row in info.read_text().splitlines() if "model name" in row), cpu)
    known = {"python": platform.python_version()} | versions(PACKAGES)
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system(), "versions": known}


def digest(known):
    """Return a short name of a machine, by which the rows of files refer to it."""
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]


def line(name, row):
    numbers = f"{row['passed']:5} passed {row['failed']:3} failed {row['skipped']:3} skipped {row['seconds']:8.1f} s"
    return "\n    ".join([f"{name:45} {numbers}  {row['status']}", *row.get("notes", [])])


def summary(results, test_files, machines, ages, behind):
    """Return lines that say how many files passed, where and at which commits, and which files lack a recent result."""
    rows = list(results.values())
    whole = {key: sum(row[key] for row in rows) for key in ("passed", "failed", "skipped", "seconds")}
    good = [row for row in rows if row["status"] == "passed"]
    lines = [line("all", whole | {"status": f"{len(good)} of {len(test_files)} files passed"})]
    for commit, files in Counter(row["commit"] for row in good).most_common():
        lines.append(f"passed at {shown(commit, ages[commit])}: {files} files")
    for key, files in Counter(row["machine"] for row in good).most_common():
        known = machines[key]
        installed = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
        lines.append(f"passed on {known['cpu']}, {known['cores']} cores, {known['system']}, {installed}: {files} files")
    groups = {
        "without a result": [name for name in test_files if name not in results],
        "did not pass": [name for name, row in results.items() if row["status"] != "passed"],
        f"more than {behind} commits old": [
            name for name, row in results.items() if ages[row["commit"]] is not None and ages[row["commit"]] > behind
        ],
        "of no commit in this history": [name for name, row in results.items() if ages[row["commit"]] is None],
    }
    lines += [f"{group}, {len(names)} files: {', '.join(sorted(names))}" for group, names in groups.items() if names]
    return "\n".join(lines)


def shown(commit, age):
    if commit is None:
        return "no commit"
    return f"{commit[:10]}, " + ("which is not in this history" if age is None else f"{age} commits ago")


if __name__ == "__main__":
    sys.exit(main())
