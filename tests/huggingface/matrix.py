"""The matrix of architectures, attention, batches, ranks, exchanges and placements, and the file of its result.

    python tests/huggingface/matrix.py                 # half an hour; writes benchmarks/results/huggingface-matrix.json
    python tests/huggingface/matrix.py --names Llama   # these rows alone; the file keeps the others

Each cell compares the logits of all tokens, the loss and all gradients with those of one process with transformers' own
attention, or with the equation where a layer is dilated.
"""

import argparse
import json
import sys
from collections import Counter
from datetime import UTC, datetime
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "huggingface-matrix.json"
PACKAGES = ["torch", "transformers"]
ATTENTION, KINDS = ("own", "dilated"), ("plain", "packed", "padded")
EXCHANGES, PLACEMENTS = ("gather", "ring", "swap"), ("contiguous", "zigzag")
# the ranks, and the tokens of a row: 48 are divided into equal parts, 53 are not
EVEN, UNEVEN = 48, 53
WORLDS = {
    "1 rank": [(1, EVEN)],
    "2 ranks": [(2, EVEN)],
    "4 ranks": [(4, EVEN)],
    "uneven": [(2, UNEVEN), (3, UNEVEN), (4, UNEVEN)],
}
TOLERANCE, ROUNDED_TOLERANCE = 1e-12, 1e-6


class Way(NamedTuple):
    """How a row is divided; `ranks` names the column of the table."""

    ranks: str
    world: int
    tokens: int
    exchange: str
    placement: str

    @property
    def changes(self):
        """What the configuration must say so that heads can be swapped, 4 ranks between them."""
        return {"num_key_value_heads": 4} if self.exchange == "swap" and self.world == 4 else {}

    @property
    def refusal(self):
        """The message by which a model with 4 heads refuses this way, or an empty string."""
        return "swap needs key heads that 3 ranks divide" if self.exchange == "swap" and self.world == 3 else ""


WAYS = [
    Way(ranks, world, tokens, *rest)
    for ranks, sizes in WORLDS.items()
    for world, tokens in sizes
    for rest in product(EXCHANGES, PLACEMENTS)
]


def split_steps(group, name, kind, attention, ways):
    """Return for each way what `split_step` returns, the gradients on the first rank alone; the message if refused."""
    import torch.distributed as dist
    from architectures import batch, split_step
    from dilated_models import dilated

    steps = []
    for way in ways:
        change = dilated if attention == "dilated" else None
        arguments = name, kind, way.placement, way.exchange, batch(kind, way.tokens), change, way.changes
        try:
            positions, logits, loss, gradients = split_step(group, *arguments)
        except ValueError as error:
            steps.append(str(error))
        else:
            is_first = dist.get_group_rank(group, dist.get_rank()) == 0
            steps.append((positions, logits, loss, gradients if is_first else None))
    return steps


@lru_cache(8)
def expected(name, kind, attention, tokens, changes):
    from architectures import whole_step
    from dilated_models import whole_dilated_step

    step = whole_dilated_step if attention == "dilated" else whole_step
    return step(name, kind, length=tokens, **dict(changes))


class Row:
    """The outcomes of an architecture with one kind of attention."""

    def __init__(self, name, attention):
        self.name, self.attention = name, attention
        self.equal, self.refused, self.faults = Counter(), Counter(), []
        self.largest = self.largest_rounded = 0.0

    def fill(self, pool):
        """Run all cells, those of one world and kind together."""
        for kind, sizes in product(KINDS, WORLDS.values()):
            for world, tokens in sizes:
                ways = [way for way in WAYS if (way.world, way.tokens) == (world, tokens)]
                ranks = pool.run(world, split_steps, self.name, kind, self.attention, ways)
                for way, parts in zip(ways, zip(*ranks, strict=True), strict=True):
                    self.add(kind, way, parts)
        return self

    def add(self, kind, way, parts):
        from architectures import largest_differences

        cell = f"{self.name}, {self.attention}, {kind}, {way}"
        if messages := [part for part in parts if isinstance(part, str)]:
            if not way.refusal or len(messages) < len(parts) or any(way.refusal not in each for each in messages):
                self.faults.append(f"{cell}: {messages[0]}")
            self.refused[way.ranks] += 1
            return
        whole = expected(self.name, kind, self.attention, way.tokens, tuple(way.changes.items()))
        differences = largest_differences(whole, parts, kind)
        for what, difference in differences.items():
            if self.is_rounded(what):
                self.largest_rounded = max(self.largest_rounded, difference)
            else:
                self.largest = max(self.largest, difference)
            if not difference < (ROUNDED_TOLERANCE if self.is_rounded(what) else TOLERANCE):
                self.faults.append(f"{cell}: {what} differs by {difference:.1e}")
        self.equal[way.ranks] += 1

    def is_rounded(self, what):
        from architectures import ROUNDED

        return self.name in ROUNDED and ROUNDED[self.name] in what

    def counts(self):
        """Return how many cells are equal and refused, by the number of ranks."""
        return {"equal": dict(self.equal), "refused": dict(self.refused)}

    def result(self):
        assert not self.faults, "\n".join(self.faults)
        largest = {"largest_difference": float(f"{self.largest:.1e}")}
        rounded = {"largest_rounded_difference": float(f"{self.largest_rounded:.1e}")} if self.largest_rounded else {}
        return self.counts() | largest | rounded


def table(result):
    """Return the table of the page, and sentences that count the cells and name the architectures without a run."""
    from architectures import ARCHITECTURES

    architectures = result["rows"]
    missing = [name for name in ARCHITECTURES if name not in architectures]
    rows = [each[attention] for each in architectures.values() for attention in ATTENTION]
    equal, refused = (sum(sum(row[which].values()) for row in rows) for which in ("equal", "refused"))
    runs = {
        f"on {each['date']} at commit `{each['commit'][:12]}` with torch {each['versions']['torch']} and transformers "
        f"{each['versions']['transformers']}"
        for each in architectures.values()
    }
    lines = [
        f"{equal:,} cases are equal, and {refused:,} are refused, as swap cannot divide 4 heads among 3 ranks. Run "
        f"{'; '.join(sorted(runs))}." + (f" Not run: {', '.join(missing)}." if missing else ""),
        "",
        f"| architecture | attention | {' | '.join(WORLDS)} | refused | largest difference |",
        f"| --- | --- |{' --- |' * len(WORLDS)} --- | --- |",
    ]
    for name, attention in product(architectures, ATTENTION):
        row = architectures[name][attention]
        cells = " | ".join(str(row["equal"].get(ranks, 0)) for ranks in WORLDS)
        largest = "" if not row["largest_difference"] else f"{row['largest_difference']:.0e}"
        if "largest_rounded_difference" in row:
            largest += f"{', ' if largest else ''}{row['largest_rounded_difference']:.0e} after float32"
        lines.append(f"| {name} | {attention} | {cells} | {sum(row['refused'].values())} | {largest} |")
    return "\n".join(lines) + "\n"


def main():
    from architectures import ARCHITECTURES
    from pool import Pool
    from resumed import commit_of, versions, write

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    options = parser.parse_args()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}}
    run = {"date": datetime.now(UTC).date().isoformat(), "commit": commit_of(ROOT), "versions": versions(PACKAGES)}
    assert run["commit"], "changes must be committed, so that the result can name its commit"
    pool = Pool(4)
    try:
        for name in options.names:
            rows = {attention: Row(name, attention).fill(pool).result() for attention in ATTENTION}
            known = result["rows"] | {name: run | rows}
            result["rows"] = {each: known[each] for each in ARCHITECTURES if each in known}
            write(RESULT, result)
            print(name, rows, flush=True)
    finally:
        pool.close()


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks"), str(Path(__file__).parent)]
    main()
