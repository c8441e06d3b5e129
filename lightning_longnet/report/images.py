"""The charts of a report as PNGs, drawn with matplotlib."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lightning_longnet.attention.pattern.pattern import Pattern

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lightning_longnet.report.charts import Chart
    from lightning_longnet.report.runs import Run

_COLOURS = ("#0a6ba8", "#c2452d", "#2c7d3f", "#7d4fb0", "#a86a00", "#4f5b66")
_STYLES: dict[str, dict[str, Any]] = {
    "solid": {},
    "dashed": {"linestyle": "--"},
    "faint": {"alpha": 0.45},
    "marked": {"marker": "o", "markersize": 3, "linestyle": ":"},
    "dots": {"linestyle": "none", "marker": "o", "markersize": 3},
}


def write_images(
    runs: Sequence[Run], charts: Sequence[Chart], stem: Path, report: Callable[[int, int], None] | None = None
) -> list[Path]:
    """Write `stem`-KEY.png for each chart and `stem`-pattern-I-J.png for pattern J of run I, and return the paths.

    `report` is called after each with the number of those that are written, and of all.
    """
    kinds = {(i, j): kind for i, run in enumerate(runs) for j, kind in enumerate(run.record.get("attention", []))}
    drawings: dict[str, Callable[[], Figure]] = {chart.key: partial(figure_of, chart) for chart in charts}
    drawings |= {f"pattern-{i}-{j}": Pattern(**kind["pattern"]).plot for (i, j), kind in kinds.items()}
    paths = []
    for name, draw in drawings.items():
        paths.append(stem.with_name(f"{stem.name}-{name}.png"))
        draw().savefig(paths[-1], dpi=150)
        if report is not None:
            report(len(paths), len(drawings))
    return paths


def figure_of(chart: Chart) -> Figure:
    """Return a chart as a figure of matplotlib."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for line in chart.lines:
        if line.points:
            xs, ys = zip(*line.points, strict=True)
            colour = _COLOURS[line.colour % len(_COLOURS)]
            style = dict(_STYLES[line.style])
            if line.dashes is not None and line.style != "dots":
                dash, gap, before = (each / 2 for each in line.dashes)  # in units of the width of the line
                style["markevery"] = line.dash_phase
                style["linestyle"] = (-before, (dash, gap))
            label = " ".join(filter(None, (line.run, line.name))) or None
            axes.plot(xs, ys, color=colour, label=label, **style)
    colours = sorted({bars.colour for bars in chart.bars})
    stacked = {colour: [0.0] * len(chart.labels) for colour in colours}
    for bars in chart.bars:
        width = 0.8 / len(colours)
        at = [i + (colours.index(bars.colour) - (len(colours) - 1) / 2) * width for i in range(len(chart.labels))]
        colour = _COLOURS[bars.colour % len(_COLOURS)]
        axes.bar(at, bars.values, width, bottom=stacked[bars.colour], color=colour, label=bars.run or None)
        stacked[bars.colour] = [a + b for a, b in zip(stacked[bars.colour], bars.values, strict=True)]
    if chart.labels:
        axes.set_xticks(range(len(chart.labels)), chart.labels)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if chart.from_zero:
        axes.set_ylim(0, max(1.08 * axes.dataLim.ymax, 1.0 if chart.is_percent else 0.0) or None)
    if chart.is_percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel="" if chart.is_percent else chart.unit)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if any(line.run or line.name for line in chart.lines) or any(bars.run for bars in chart.bars):
        axes.legend(fontsize=8)
    return figure
