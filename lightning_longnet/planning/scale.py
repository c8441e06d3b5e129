"""A simulation of attention from 8K to a billion tokens, dilated beside a dense ring, at one number of tokens a device.

Segments grow with the sequence, and rates with segments, so that every branch costs a token as much as the first; the
whole sequence is the last branch's segment.  Formulas count what ranks compute and send; tests compare them with plans
of fewer ranks.
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
    """The cost of a layer's forward and backward on the busiest rank, which receives keys and sends their gradients."""

    pairs: int
    moved_bytes: int
    messages: int

    def seconds(self, device: Device, is_one_node: bool) -> float:
        """Return the longer of computing and communicating, which overlap."""
        peak = device.peak(torch.bfloat16) * device.efficiency[1]
        computed = self.pairs * HEAD_DIM * (FORWARD + BACKWARD) / peak
        link = device.node_link if is_one_node else device.network
        return max(computed, self.moved_bytes / link + self.messages * LATENCY)


class Row(NamedTuple):
    """The costs and times of both kinds of attention at one length."""

    tokens: int
    devices: int
    dilated: Cost
    dense: Cost
    dilated_seconds: float
    dense_seconds: float


def segments(tokens: int) -> list[tuple[int, int]]:
    """Return (segment length, dilation rate) of each branch."""
    branches, length = [], min(FIRST_SEGMENT, tokens)
    while True:
        branches.append((length, max(1, length // FIRST_SEGMENT)))
        if length == tokens:
            return branches
        length = min(GROWTH * length, tokens)


def pattern(tokens: int) -> Pattern:
    """Return the dilated pattern of a length."""
    lengths, rates = zip(*segments(tokens), strict=True)
    return Pattern.dilated(lengths, rates, is_causal=True)


def dilated(tokens: int, here: int) -> Cost:
    """Return the cost of the last rank, which sees every segment to its end, with `here` tokens on each rank."""
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
    """Return the pairs of a head: its rows on the last rank, each with the rows of its segment up to itself."""
    rows = length // rate
    if length <= here:
        return here // length * (rows * (rows + 1) // 2)
    own = here // rate
    if not own:  # the rate exceeds a rank's tokens: some ranks have one row, others none
        return rows
    return own * (rows - own) + own * (own + 1) // 2


def dense(tokens: int, here: int) -> Cost:
    """Return the cost of a ring over zigzag parts, which balance pairs: keys go round twice, their gradients once."""
    ranks = tokens // here
    pairs = tokens * (tokens + 1) // 2 // ranks
    cells = (tokens - here) * HEADS * 2 * HEAD_DIM
    return Cost(HEADS * pairs, cells * (2 * ITEMSIZE + WIDE_ITEMSIZE), 3 * (ranks - 1))


def simulate(device: Device) -> list[Row]:
    """Return a row for each of `LENGTHS` on a kind of device."""
    rows = []
    for tokens in LENGTHS:
        here = min(tokens, TOKENS_PER_DEVICE)
        costs = dilated(tokens, here), dense(tokens, here)
        is_one_node = tokens // here <= NODE
        times = [cost.seconds(device, is_one_node) for cost in costs]
        rows.append(Row(tokens, tokens // here, costs[0], costs[1], times[0], times[1]))
    return rows


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
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
    """Return plain values for JSON."""
    return [{**row._asdict(), "dilated": row.dilated._asdict(), "dense": row.dense._asdict()} for row in rows]


def draw(rows: list[Row], device: Device) -> Figure:
    """Return a figure of a layer's milliseconds against the tokens, both axes logarithmic."""
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
