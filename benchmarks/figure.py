"""Plots of the results of attention.py, exchange.py, recall.py and inference.py, drawn from their JSON files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

OURS, PEER, NEUTRAL = "#b3321f", "#2b5d8a", "#999999"
_COLOURS = {
    "lightning-longnet": OURS,
    "lightning-longnet, blocked": "#e2917f",
    "torchscale": PEER,
    "torchscale, routed": "#7fa8cc",
    "dense": "#555555",
    "dense, routed": "#aaaaaa",
    "lightning-longnet, padded": "#8c6bb1",
    "lightning-longnet, dropout 0.1": "#d9a441",
    "lightning-longnet, flash": "#2a9d8f",
    "lightning-longnet, sdpa": "#f4a261",
    "lightning-longnet, cudnn": "#4895ef",
    "lightning-longnet, eager": "#bc6c25",
    "dilated-attention-pytorch": "#8a9a74",
}
# participants whose times do not compare with the others, and why: they are thin, with hollow marks
_ANOTHER_FUNCTION = {
    "dilated-attention-pytorch": "another function: a head has one branch, a fraction of the pairs",
    "lightning-longnet, padded": "fewer pairs: a quarter of the keys is hidden",
}


def float32_tensors(row: dict[str, Any], machine: dict[str, Any]) -> float:
    """Return the peak memory in units of a float32 tensor of the shape of q."""
    return float(row["peak_mib"] * 2**20 / (row["tokens"] * machine["heads"] * machine["head_dim"] * 4))


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a result of attention.py: speed and memory against the length, for each pattern."""
    from matplotlib.figure import Figure

    machine, names = result["machine"], list(dict.fromkeys(row["pattern"] for row in result["rows"]))
    figure = Figure(figsize=(10, 7.4), layout="constrained")
    axes = figure.subplots(2, len(names), sharex=True, squeeze=False)
    has_halves = any(row["dtype"] == "bfloat16" for row in result["rows"])
    for column, name in zip(axes.T, names, strict=True):
        rows = [row for row in result["rows"] if row["pattern"] == name]
        _draw_lines(column[0], rows, [row["tokens_per_second"] for row in rows])
        for participant, reason in _ANOTHER_FUNCTION.items():
            lines = [line for line in column[0].lines if str(line.get_label()).startswith(participant)]
            for line in lines:
                place: dict[str, Any] = {
                    "xytext": (0, 6),
                    "textcoords": "offset points",
                    "fontsize": 8,
                    "color": line.get_color(),
                }
                column[0].annotate(reason.partition(":")[0], line.get_xydata()[0], **place)
        _draw_lines(column[1], rows, [float32_tensors(row, machine) for row in rows])
        column[0].set_title(name)
        column[1].set_xlabel("tokens (solid: float32, dotted: bfloat16)" if has_halves else "tokens")
        lengths = sorted({row["tokens"] for row in rows})
        column[1].set_xticks(lengths, [f"{length:,}" for length in lengths], minor=False)
    for axis, title in zip(axes[:, 0], ("tokens a second", "peak, float32 tensors of (N, H, D)"), strict=True):
        axis.set_ylabel(title)
    shown = {
        label: handle
        for axis in axes[0]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)  # a pattern may lack a participant
    }
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(
        f"forward + backward, causal, {machine['heads']} heads of {machine['head_dim']}; "
        f"{machine.get('gpu') or machine['cpu']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)


def _draw_lines(axis: Axes, rows: list[dict[str, Any]], values: list[float]) -> None:
    """Draw a line for each participant and dtype of the rows, whose values are given in the same order."""
    for participant, colour in _COLOURS.items():
        reason = _ANOTHER_FUNCTION.get(participant)
        style = {"linewidth": 0.9, "markerfacecolor": "white"} if reason else {"linewidth": 1.7}
        for dtype, line in (("float32", "-"), ("bfloat16", ":")):
            points = sorted(
                (row["tokens"], value)
                for row, value in zip(rows, values, strict=True)
                if (row["participant"], row["dtype"]) == (participant, dtype)
            )
            if not points:
                continue
            label = f"{participant} ({reason})" if reason else participant
            label = label if dtype == "float32" or all(row["dtype"] == dtype for row in rows) else "_"
            axis.plot(*zip(*points, strict=True), line, color=colour, marker="o", markersize=3.5, label=label, **style)
    axis.set_xscale("log", base=2)
    axis.grid(alpha=0.25)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.spines[["top", "right"]].set_visible(False)


def draw_exchange(result: dict[str, Any], path: Path) -> None:
    """Draw a result of exchange.py: the time of a step and the bytes sent, for each number of ranks and pattern."""
    from matplotlib.figure import Figure

    cases: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        cases.setdefault((row["ranks"], row["tokens"], row["widths"]), []).append(row)
    heights = [len(rows) for rows in cases.values()]
    figure = Figure(figsize=(10, 1 + 0.23 * sum(heights) + 0.4 * len(cases)), layout="constrained")
    axes = figure.subplots(len(cases), 2, squeeze=False, height_ratios=heights)
    for (time, sent), ((ranks, tokens, widths), rows) in zip(axes, cases.items(), strict=True):
        _draw_bars(time, rows, "step_seconds", "s")
        if ranks > 1:
            _draw_bars(sent, rows, "sent_mib_most", "MiB")
            sent.set_yticklabels([])
        else:
            sent.set_axis_off()
            sent.text(0, 0.5, "one rank sends nothing", transform=sent.transAxes, fontsize=9, color="#555555")
        kind = "rank" if ranks == 1 else "ranks"
        time.set_title(f"{ranks} {kind}, {tokens:,} tokens, segments {widths}", fontsize=9, loc="left")
    axes[-1, 0].set_xlabel("seconds a step")
    axes[-1, 1].set_xlabel("most MiB sent by a rank, forward and backward")
    figure.savefig(path, dpi=120)


def _draw_bars(axis: Axes, rows: list[dict[str, Any]], key: str, unit: str) -> None:
    """Draw a bar for each row; one that is far longer than all others is cut, and its label says so."""
    values = [row[key] for row in rows]
    ordered = sorted(values)
    most = ordered[-2] if len(values) > 1 and ordered[-1] > 10 * ordered[-2] > 0 else ordered[-1]
    limit = 1.3 * most or 1.0
    colours = [_colour_of_bar(row["participant"]) for row in rows]
    bars = axis.barh([row["participant"] for row in rows], [min(value, limit) for value in values], color=colours)
    for bar, value in zip(bars, values, strict=True):
        is_cut = value > limit
        text = (
            f"{value:.2f} {unit}, {value / limit:.0f} times as long as this axis" if is_cut else f"{value:.2f} {unit}"
        )
        place: dict[str, Any] = {"ha": "right", "color": "white"} if is_cut else {"ha": "left", "color": "black"}
        offset = (-4 if is_cut else 3, 0)
        end = bar.get_width(), bar.get_y() + bar.get_height() / 2
        axis.annotate(text, end, offset, textcoords="offset points", va="center", fontsize=8, **place)
    axis.set_xlim(0, limit)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)


def _colour_of_bar(participant: str) -> str:
    if participant in ("gather", "ring", "swap"):
        return OURS
    return NEUTRAL if participant == "same blocks, no exchange" else PEER


def draw_recall(result: dict[str, Any], path: Path) -> None:
    """Draw a result of recall.py: the right answers of each pattern during training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axis = figure.subplots()
    for row, colour in zip(result["rows"], (OURS, PEER), strict=True):
        steps, shares = zip(*row["curve"], strict=True)
        axis.plot(steps, shares, "o-", color=colour, linewidth=1.7, markersize=3.5, label=row["pattern"])
    chance = result["rows"][0]["chance"]
    axis.axhline(chance, color="#888888", linestyle=":", linewidth=1, label=f"by chance, {chance:.1%}")
    axis.set_ylim(0, 1.05)
    axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.set_xlabel("steps")
    axis.set_ylabel("right answers")
    axis.set_title(
        f"{result['items']} tokens to repeat after {result['distance']}; "
        f"{result['ranks']} ranks with {result['tokens'] // result['ranks']} tokens each",
        fontsize=10,
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9, loc="center right")
    figure.savefig(path, dpi=120)


def draw_inference(result: dict[str, Any], path: Path) -> None:
    """Draw a result of inference.py: the time of a token and the memory of the cache against the length of the text."""
    from matplotlib.figure import Figure

    colours = {"DilatedCache": OURS, "full cache, SDPA": PEER, "Llama of transformers": "#8a9a74", "no cache": NEUTRAL}
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    rows = [row for row in result["rows"] if "ms" in row]
    contexts = sorted({row["context"] for row in rows})
    for axis, key, label in zip(
        figure.subplots(1, 2), ("ms", "mib"), ("milliseconds a token", "MiB of the cache"), strict=True
    ):
        for name, colour in colours.items():
            points = [(row["context"], row[key]) for row in rows if row["participant"] == name]
            if points and not (key == "mib" and name == "no cache"):
                axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axis.set_xlabel("tokens of the text")
        axis.set_title(label)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
