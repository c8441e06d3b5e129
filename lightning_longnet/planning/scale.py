"""Attention from 8K to a billion tokens, at one number of tokens a device: dilated beside a dense ring, by simulation.

Segments grow with the sequence, and rates with segments, so that every branch costs a token as much as the first; the
whole sequence is the last branch's segment.  What ranks compute and what moves is counted by formulas, which tests
compare with plans of fewer ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_longnet.attention.pattern.pattern import Pattern
from lightning_longnet.planning.speed import BACKWARD, FORWARD, LATENCY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_longnet.planning.devices import Device

FIRST_SEGMENT, GROWTH = 4096, 8
TOKENS_PER_DEVICE, NODE = 65_536, 8
LENGTHS = tuple(2**i for i in range(13, 31))
HEADS, HEAD_DIM, ITEMSIZE, WIDE_ITEMSIZE = 12, 64, 2, 4


class Cost(NamedTuple):
    """Of the rank that has most to do, in one layer's forward and backward: keys come, and gradients go home."""

    pairs: int
    moved_bytes: int
    messages: int

    def seconds(self, device: Device, is_one_node: bool) -> float:
        """What is computed and what travels go on at the same time; the longer of both is what it takes."""
        peak = device.peak(torch.bfloat16) * device.efficiency[1]
        computed = self.pairs * HEAD_DIM * (FORWARD + BACKWARD) / peak
        link = device.node_link if is_one_node else device.network
        return max(computed, self.moved_bytes / link + self.messages * LATENCY)


class Row(NamedTuple):
    tokens: int
    devices: int
    dilated: Cost
    dense: Cost
    dilated_seconds: float
    dense_seconds: float


def segments(tokens: int) -> list[tuple[int, int]]:
    """(segment length, dilation rate) of each branch."""
    found, length = [], min(FIRST_SEGMENT, tokens)
    while True:
        found.append((length, max(1, length // FIRST_SEGMENT)))
        if length == tokens:
            return found
        length = min(GROWTH * length, tokens)


def pattern(tokens: int) -> Pattern:
    lengths, rates = zip(*segments(tokens), strict=True)
    return Pattern.dilated(lengths, rates, is_causal=True)


def dilated(tokens: int, here: int) -> Cost:
    """Of the last rank, which sees all the segments to their ends; `here` tokens a rank."""
    pairs = rows = messages = 0
    before = here
    for length, rate in segments(tokens):
        pairs += _pairs_of_last(length, rate, here)
        remote = max(0, length - max(before, here))
        rows += remote // rate
        messages += min(remote // here, remote // rate)
        before = length
    return Cost(HEADS * pairs, rows * HEADS * 2 * HEAD_DIM * (ITEMSIZE + WIDE_ITEMSIZE), 2 * messages)


def _pairs_of_last(length: int, rate: int, here: int) -> int:
    """Of a head: its rows here, each with those of its segment that are not behind it."""
    rows = length // rate
    if length <= here:
        return here // length * (rows * (rows + 1) // 2)
    own = here // rate
    if not own:  # rows are farther apart than a rank is long: one in some ranks has one
        return rows
    return own * (rows - own) + own * (own + 1) // 2


def dense(tokens: int, here: int) -> Cost:
    """A ring over zigzag parts, where all ranks have as many pairs: keys go round twice, and their gradients once."""
    ranks = tokens // here
    pairs = tokens * (tokens + 1) // 2 // ranks
    cells = (tokens - here) * HEADS * 2 * HEAD_DIM
    return Cost(HEADS * pairs, cells * (2 * ITEMSIZE + WIDE_ITEMSIZE), 3 * (ranks - 1))


def simulate(device: Device) -> list[Row]:
    found = []
    for tokens in LENGTHS:
        here = min(tokens, TOKENS_PER_DEVICE)
        costs = dilated(tokens, here), dense(tokens, here)
        is_one_node = tokens // here <= NODE
        times = [cost.seconds(device, is_one_node) for cost in costs]
        found.append(Row(tokens, tokens // here, costs[0], costs[1], times[0], times[1]))
    return found


def table(rows: list[Row]) -> str:
    lines = [
        "| tokens | devices | dilated, ms | dense ring, ms | dilated moves, MiB | dense moves, MiB |",
        "|---" * 6 + "|",
    ]
    lines += [
        f"| {row.tokens:,} | {row.devices:,} | {1e3 * row.dilated_seconds:,.2f} | {1e3 * row.dense_seconds:,.2f} | "
        f"{row.dilated.moved_bytes / 2**20:,.1f} | {row.dense.moved_bytes / 2**20:,.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def values(rows: list[Row]) -> list[dict[str, Any]]:
    """Plain ones, for JSON."""
    return [{**row._asdict(), "dilated": row.dilated._asdict(), "dense": row.dense._asdict()} for row in rows]


def draw(rows: list[Row], device: Device) -> Figure:
    """Milliseconds of a layer against the tokens, both axes logarithmic."""
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError("a picture needs matplotlib: pip install matplotlib") from missing

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axis = figure.subplots()
    tokens = [row.tokens for row in rows]
    free = [row.dilated._replace(messages=0).seconds(device, row.devices <= NODE) for row in rows]
    for name, colour, style, times in (
        ("dense ring", "#555555", "s-", [row.dense_seconds for row in rows]),
        ("dilated", "#b3321f", "o-", [row.dilated_seconds for row in rows]),
        (f"dilated, without {1e6 * LATENCY:.0f} us a message", "#e2917f", "--", free),
    ):
        axis.plot(tokens, [1e3 * each for each in times], style, color=colour, markersize=4, label=name)
    axis.axvline(TOKENS_PER_DEVICE, color="#999999", linewidth=1, linestyle=":")
    words = f"one device to the left,\n{TOKENS_PER_DEVICE:,} tokens on each to the right"
    top = max(row.dense_seconds for row in rows) * 1e3
    axis.text(TOKENS_PER_DEVICE * 1.15, top, words, fontsize=8, va="top", color="#555555")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    names = {2**13: "8K", 2**16: "64K", 2**20: "1M", 2**24: "16M", 2**27: "128M", 2**30: "1B"}
    axis.set_xticks(list(names), list(names.values()))
    axis.set(xlabel="tokens", ylabel="forward + backward of a layer, ms")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.2, 0.9), fontsize=9)
    axis.set_title(f"Simulated: {HEADS} heads of {HEAD_DIM}, causal, bfloat16, {device.name}", fontsize=10)
    return figure
