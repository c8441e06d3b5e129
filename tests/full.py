"""Runs all tests, the matrices and soaks among them, and keeps what came of each file: `make test-full`.

Every file runs in a separate process, and property tests draw ten times as many cases as in `make test-long`, new
ones each time.  This takes hours.  The result is written after each file, and a run that was stopped goes on: it leaves
out files that passed at the same commit, on the same machine and with the same versions.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["torch", "lightning", "deepspeed", "transformers", "hypothesis", "pytest"]
sys.path.append(str(ROOT / "benchmarks"))
from resumed import commit_of, counts, ended, versions, write  # noqa: E402


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="run these files of the folder alone")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", help="the folder of the tests")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/test-full.json")
    parser.add_argument("--timeout", type=float, default=4 * 3600, help="seconds until a file is given up")
    parser.add_argument("--again", action="store_true", help="run files that have passed, too")
    arguments = parser.parse_args(words)

    folder = arguments.tests.resolve()
    test_files = sorted(str(path.relative_to(folder)) for path in folder.rglob("test_*.py"))
    chosen = [str(Path(name).resolve().relative_to(folder)) for name in arguments.files] or test_files
    if unknown := set(chosen) - set(test_files):
        parser.error(f"files must be tests in {folder}, got {', '.join(sorted(unknown))}")

    commit, here = commit_of(folder), machine()
    kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    results = {name: row for name, row in kept.get("files", {}).items() if name in test_files}
    is_resumed = commit is not None and not arguments.again and kept.get("machine") == here
    for name in chosen:
        if is_resumed and results.get(name, {}).get("status") == "passed" and results[name]["commit"] == commit:
            print(f"{line(name, results[name])}, before", flush=True)
            continue
        results[name] = {"commit": commit, **run(folder, name, arguments.timeout)}
        print(line(name, results[name]), flush=True)
        write(arguments.out, {"machine": here, "files": dict(sorted(results.items()))})
    missing = [name for name in test_files if name not in results]
    print(summary(results.values(), missing))
    return int(bool(missing) or any(row["status"] != "passed" for row in results.values()))


def run(folder, name, timeout):
    """Run a file, and return the counts of its outcomes."""
    environment = {key: text for key, text in os.environ.items() if key != "CI"}  # which draws the same cases each time
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(folder / name), "-q", "--draws", "many", "--no-skips"]
        command += ["-p", "no:cacheprovider", f"--junitxml={report}", "-o", "junit_family=xunit1"]
        end = ended(command, timeout, folder.parent, environment)
        if end.status != "passed":
            print(end.output, flush=True)
        return {"status": end.status, **counts(report), "seconds": end.seconds, "date": end.date}


def machine():
    cpu, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((row.partition(": ")[2] for row in info.read_text().splitlines() if "model name" in row), cpu)
    known = {"python": platform.python_version()} | versions(PACKAGES)
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system(), "versions": known}


def line(name, row):
    numbers = f"{row['passed']:5} passed {row['failed']:3} failed {row['skipped']:3} skipped {row['seconds']:8.1f} s"
    return "\n    ".join([f"{name:45} {numbers}  {row['status']}", *row.get("notes", [])])


def summary(rows, missing):
    rows = list(rows)
    whole = {key: sum(row[key] for row in rows) for key in ("passed", "failed", "skipped", "seconds")}
    good = sum(row["status"] == "passed" for row in rows)
    shown = line("all", whole | {"status": f"{good} of {len(rows)} files passed"})
    return shown + (f"\nnot run: {', '.join(missing)}" if missing else "")


if __name__ == "__main__":
    sys.exit(main())
