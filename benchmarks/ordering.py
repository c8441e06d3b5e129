"""Compare a Hilbert curve through a grid with row-by-row order: compactness of segments, accuracy and time.

    python benchmarks/ordering.py
    python benchmarks/ordering.py --table          # the committed result, as the pages show it

The task: an image of noise has two red marks and two blue ones.  In one class each blue mark is near a red one, in the
other none is.  A single patch does not determine the class, and segments are shorter than the image.  Both models have
the same initial weights and the same images.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import warnings
from functools import partial
from pathlib import Path
from random import Random
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from machine import allocated, described

from lightning_longnet import LongViT, LongViTConfig, Pattern, hilbert_order, raster_order
from lightning_longnet.attention.pattern.ordering import Ordering, order_of

if TYPE_CHECKING:
    from torch import Tensor

GRID, SEGMENTS = 256, (64, 256, 1024, 4096)
MADE = [(256, 256), (1024, 1024), (1021, 1019), (100, 101, 103)]
ORDERINGS: tuple[Ordering, ...] = ("raster", "hilbert")
SIDE, NEAR, FAR = 8, 1, 3
PLACES = [(row, column) for row in range(SIDE) for column in range(SIDE)]
PATTERN = Pattern.dilated((16,), (1,))
LEARNING_RATE = 1e-3
STEPS, BATCH, SEEDS = 600, 32, (0, 1)
COST_PATTERN = Pattern.dilated((256, 1024, 4096), (1, 2, 4))
COST_SIDE, COST_PATCH, ROUNDS = 64, 4, 5
RESULT = Path(__file__).parent / "results" / "ordering-cpu.json"


def mean_distance(order: Tensor, columns: int, segment: int) -> float:
    """Return the mean distance in the grid of two tokens of one segment."""
    places = torch.stack([order // columns, order % columns], 1).float()
    total = sum(torch.cdist(one, one).double().sum().item() for one in places.split(segment))
    return round(total / (len(order) * (segment - 1)), 2)


def distances() -> list[dict[str, Any]]:
    orders = {name: order_of(name, (GRID, GRID)) for name in ORDERINGS}
    found: list[dict[str, Any]] = []
    for segment in SEGMENTS:
        side = int(segment**0.5)
        row: dict[str, Any] = {"segment": segment, "square": mean_distance(raster_order((side, side)), side, segment)}
        found.append(row | {name: mean_distance(order, GRID, segment) for name, order in orders.items()})
    return found


def making(shape: tuple[int, ...]) -> dict[str, Any]:
    times = []
    for _ in range(ROUNDS):
        begin = perf_counter()
        hilbert_order(shape)
        times.append(perf_counter() - begin)
    return {"shape": shape, "ms": round(statistics.median(times) * 1e3, 1), "fastest_ms": round(min(times) * 1e3, 1)}


def images(many: int, random: Random) -> tuple[Tensor, Tensor]:
    """Return pixels (many, 2, SIDE, SIDE), where each pixel is a patch, and labels (many,)."""
    noise = torch.Generator().manual_seed(random.getrandbits(63))
    pixels = 0.1 * torch.randn(many, 2, SIDE, SIDE, generator=noise)
    labels = [random.randrange(2) for _ in range(many)]
    for image, label in zip(pixels, labels, strict=True):
        first = random.sample(PLACES, 2)
        if label:
            second = [random.choice([b for b in PLACES if 0 < grid_distance(a, b) <= NEAR]) for a in first]
        else:
            second = random.sample([b for b in PLACES if all(grid_distance(a, b) >= FAR for a in first)], 2)
        for colour, marks in enumerate((first, second)):
            for row, column in marks:
                image[colour, row, column] = 1
    return pixels, torch.tensor(labels)


def grid_distance(a: tuple[int, int], b: tuple[int, int]) -> int:
    return max(abs(a[0] - b[0]), abs(a[1] - b[1]))


def learning(ordering: Ordering, seed: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"image_size": SIDE, "patch_size": 1, "channels": 2, "classes": 2, "ordering": ordering}
    model = LongViT(LongViTConfig(PATTERN, 32, 2, 4, **options))
    random, held = Random(seed), images(512, Random(1_000_003))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01)
    curve, begin = [], perf_counter()
    for step in range(1, steps + 1):
        pixels, labels = images(BATCH, random)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / 100, 2 * (1 - step / (steps + 1)))
        F.cross_entropy(model(pixels), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            with torch.no_grad():
                right = torch.cat([model(part).argmax(1) for part in held[0].split(128)]) == held[1]
            curve.append((step, round(right.double().mean().item(), 4)))
    found = {"ordering": ordering, "seed": seed, "accuracy": curve[-1][1], "curve": curve}
    return found | {"seconds": round(perf_counter() - begin, 1)}


def costs() -> list[dict[str, Any]]:
    """Return the time of a forward and backward of the model with each ordering, measured alternately."""
    calls = {}
    for name in ORDERINGS:
        torch.manual_seed(0)
        size = COST_SIDE * COST_PATCH
        model = LongViT(LongViTConfig(COST_PATTERN, 128, 2, 4, image_size=size, patch_size=COST_PATCH, ordering=name))
        calls[name] = partial(step, model, torch.randn(1, 3, size, size))
    times: dict[str, list[float]] = {name: [] for name in ORDERINGS}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin = perf_counter()
            call()
            times[name].append(perf_counter() - begin)
    return [
        {
            "ordering": name,
            "ms": round(statistics.median(times[name]) * 1e3, 1),
            "fastest_ms": round(min(times[name]) * 1e3, 1),
            "peak_mib": round(allocated(call) / 2**20, 1),
        }
        for name, call in calls.items()
    ]


def step(model: LongViT, pixels: Tensor) -> None:
    model.zero_grad()
    model(pixels).sum().backward()


def table(result: dict[str, Any]) -> str:
    lines = ["| tokens of a segment | raster | Hilbert | a square |", "|---|---|---|---|"]
    lines += [
        f"| {row['segment']:,} | {row['raster']:.1f} | {row['hilbert']:.1f} | {row['square']:.1f} |"
        for row in result["distances"]
    ]
    lines += ["", "| order | right answers, each seed | a step | fastest | peak |", "|---|---|---|---|---|"]
    for row in result["costs"]:
        found = sorted(one["accuracy"] for one in result["learning"] if one["ordering"] == row["ordering"])
        right = ", ".join(f"{one:.1%}" for one in found)
        costs = f"{row['ms']:,.0f} ms | {row['fastest_ms']:,.0f} ms | {row['peak_mib']:,.1f} MiB"
        lines.append(f"| {row['ordering']} | {right} | {costs} |")
    lines += ["", "| grid | made in | fastest |", "|---|---|---|"]
    lines += [
        f"| {' x '.join(map(str, row['shape']))} | {row['ms']:.0f} ms | {row['fastest_ms']:.0f} ms |"
        for row in result["making"]
    ]
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    curve, distance, accuracy = figure.subplots(1, 3)
    shape = (13, 18)
    order = hilbert_order(shape)
    curve.plot(order % shape[1], order // shape[1], color="#b3321f", linewidth=1.4)
    curve.set_title(f"the curve of a {shape[0]} x {shape[1]} grid", fontsize=10)
    curve.set_aspect("equal")
    curve.invert_yaxis()
    colours = {"raster": "#2b5d8a", "hilbert": "#b3321f", "square": "#888888"}
    for name, colour in colours.items():
        rows = result["distances"]
        line = ":" if name == "square" else "-"
        label = "a compact square" if name == "square" else name
        found = [row["segment"] for row in rows], [row[name] for row in rows]
        distance.plot(*found, line, color=colour, marker="o", markersize=3.5, label=label)
    distance.set_xscale("log", base=2)
    distance.set_yscale("log", base=2)
    distance.set_xlabel("tokens of a segment")
    distance.set_title(f"mean distance in a segment, {GRID} x {GRID} grid", fontsize=10)
    for row in result["learning"]:
        shown = row["ordering"] if row["seed"] == SEEDS[0] else None
        accuracy.plot(*zip(*row["curve"], strict=True), color=colours[row["ordering"]], linewidth=1.3, label=shown)
    accuracy.axhline(0.5, color="#888888", linestyle=":", linewidth=1)
    accuracy.set_xlabel("steps")
    accuracy.set_title("right answers: are the marks near each other?", fontsize=10)
    for axis in (distance, accuracy):
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--table", action="store_true", help="print the committed result")
    parser.add_argument("--plot-only", action="store_true", help="draw the committed result again, measure nothing")
    arguments = parser.parse_args()
    if arguments.plot_only:
        draw(json.loads(RESULT.read_text()), RESULT.with_suffix(".png"))
    elif not arguments.table:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", message="Nothing crosses")  # segments are short on purpose
        result: dict[str, Any] = {"machine": described("cpu"), "load": [round(load, 1) for load in os.getloadavg()]}
        result |= {"making": [making(shape) for shape in MADE], "costs": costs(), "distances": distances()}
        result["learning"] = [learning(name, seed, arguments.steps) for seed in SEEDS for name in ORDERINGS]
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        draw(result, RESULT.with_suffix(".png"))
    print(table(json.loads(RESULT.read_text())) if RESULT.exists() else "not measured")


if __name__ == "__main__":
    main()
