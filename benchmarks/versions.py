"""Compare `attend` of this checkout with that of another one: time and peak memory of short and long calls.

    python benchmarks/versions.py PATH_OF_ANOTHER_CHECKOUT

Each version runs in a process of its own.  A round measures one after the other, in alternating order; the ratio of a
round is this version over the other one, and the result states its median with a 95 % interval from resampled rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from machine import described

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/versions-cpu.json"
LENGTHS = (128, 512, 2048, 8192)
ROUNDS = 20
SECONDS = 0.4  # of one measurement

WORKER = """
import json, resource, sys, time
import torch
from lightning_longnet.attention import Pattern, attend
torch.set_num_threads(int(sys.argv[1]))
pattern = Pattern.dilated([2048 << i for i in range(5)], [1 << i for i in range(5)], is_causal=True)
for line in sys.stdin:
    tokens, seconds, with_backward = json.loads(line)
    q, k, v, grad = torch.randn(4, 1, tokens, 8, 64).unbind()
    q, k, v = (x.requires_grad_(with_backward) for x in (q, k, v))
    def step():
        out = attend(q, k, v, pattern)
        if with_backward:
            torch.autograd.grad(out, (q, k, v), grad)
    step()
    count, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds or not count:
        step()
        count += 1
    print(json.dumps([spent / count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]), flush=True)
"""


class Version:
    """A process that imports the package of a checkout."""

    def __init__(self, checkout: Path, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        command = [sys.executable, "-c", WORKER, str(threads)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, cwd=checkout, **pipes)

    def measure(self, tokens: int, with_backward: bool) -> tuple[float, float]:
        """Return the seconds of a step and the peak memory of the process in MiB."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([tokens, SECONDS, with_backward]) + "\n")
        self.process.stdin.flush()
        seconds, peak = json.loads(self.process.stdout.readline())
        return seconds, peak

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return a 95 % interval of the median by resampling."""
    generator = random.Random(0)
    medians = [median(generator.choices(ratios, k=len(ratios))) for _ in range(2000)]
    cuts = quantiles(medians, n=40)
    return cuts[0], cuts[-1]


def compare(other: Path, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each length, forward alone and with the backward."""
    rows = []
    for tokens in LENGTHS:
        for with_backward in (False, True):
            versions = {"this": Version(ROOT, threads), "other": Version(other, threads)}
            times: dict[str, list[float]] = {name: [] for name in versions}
            peaks = {}
            for i in range(rounds):
                for name in sorted(versions, reverse=bool(i % 2)):
                    seconds, peaks[name] = versions[name].measure(tokens, with_backward)
                    times[name].append(seconds)
            for version in versions.values():
                version.close()
            ratios = [a / b for a, b in zip(times["this"], times["other"], strict=True)]
            low, high = interval(ratios)
            rows.append(
                {
                    "tokens": tokens,
                    "pass": "forward + backward" if with_backward else "forward",
                    **{f"{name}_ms": round(1e3 * median(each), 3) for name, each in times.items()},
                    "ratio": round(median(ratios), 4),
                    "interval": [round(low, 4), round(high, 4)],
                    **{f"{name}_peak_mib": round(peak, 1) for name, peak in peaks.items()},
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| tokens | pass | this, ms | other, ms | ratio | 95 % | peak, MiB |", "|---" * 7 + "|"]
    lines += [
        f"| {r['tokens']:,} | {r['pass']} | {r['this_ms']:.2f} | {r['other_ms']:.2f} | {r['ratio']:.3f} | "
        f"{r['interval'][0]:.3f} to {r['interval'][1]:.3f} | {r['this_peak_mib']:.0f} / {r['other_peak_mib']:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("other", type=Path, help="another checkout, as of an earlier commit")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    rows = compare(arguments.other.resolve(), arguments.threads, arguments.rounds)
    commits = {
        name: subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=path, capture_output=True, text=True, check=True
        ).stdout.strip()
        for name, path in (("this", ROOT), ("other", arguments.other))
    }
    arguments.out.write_text(json.dumps({**described("cpu"), "commits": commits, "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
