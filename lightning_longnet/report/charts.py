"""Charts as SVG without a plotting library: lines over steps, and bars.  The style sheet sets their colours."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from html import escape
from itertools import accumulate
from math import ceil, floor, log10

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 40
_LETTER = 7.0  # width of a digit
_DASH = 9  # length of the dashes of lines with the same points
_SMOOTHED = 20  # points from which on a line is smoothed
_WINDOWS = 12  # widths of the smoothing window in a line
_ALIKE = 0.003  # of the range of a chart, by which the points of lines that share their dashes may differ
_POINTS = 300  # longer lines are reduced to this many means


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: the quantity, for the legend; empty if the chart has only one.
        points: (x, y) in ascending order of x.
        colour: the number of the run.
        style: "solid", "dashed", "faint", "marked" (a dotted line with a mark at each point) or "dots".
        run: the name of the run, for the legend; empty if there is only one run.
        dash_phase: (number, count) of lines that have the same points: each is drawn in dashes that leave room for the
            others.
    """

    name: str
    points: list[tuple[float, float]]
    colour: int
    style: str = "solid"
    run: str = ""
    dash_phase: tuple[int, int] = (0, 1)

    @property
    def is_empty(self) -> bool:
        return not self.points

    @property
    def dashes(self) -> tuple[int, int, int] | None:
        """The length of a dash, of a gap, and of what comes before the first dash, of a line with a dash phase."""
        number, count = self.dash_phase
        return (_DASH, _DASH * (count - 1), _DASH * number) if count > 1 else None


@dataclass(frozen=True)
class Bars:
    """One bar for each label of a chart.  Bars of the same colour, which is the number of the run, are stacked."""

    name: str
    values: list[float]
    colour: int
    style: str = "solid"
    run: str = ""

    @property
    def is_empty(self) -> bool:
        return not self.values


@dataclass(frozen=True)
class Chart:
    """A chart of lines, or of bars.

    Attributes:
        key: the name of the chart in ids and file names.
        title: the title.
        unit: the unit of the y axis.
        lines: the lines; empty for a bar chart.
        bars: the bars; empty for a line chart.
        labels: the label of each bar.
        x_label: the label of the x axis.
        from_zero: whether the y axis begins at 0.
        is_percent: whether values are shares, shown in percent.
        note: a sentence below the chart.
    """

    key: str
    title: str
    unit: str
    lines: list[Line] = field(default_factory=list)
    bars: list[Bars] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    x_label: str = "step"
    from_zero: bool = False
    is_percent: bool = False
    note: str = ""

    @property
    def is_empty(self) -> bool:
        return all(line.is_empty for line in self.lines) and all(bars.is_empty for bars in self.bars)


def shade(run: int) -> int:
    """Return the number of the colour of a run in the style sheet."""
    return run % 6


def svg(chart: Chart) -> str:
    """Return a chart as an SVG element."""
    return _bars(chart) if chart.bars else _lines(chart)


def _lines(chart: Chart) -> str:
    visible = [(line, thinned(line.points)) for line in chart.lines if line.points]
    xs = [x for _, points in visible for x, _ in points]
    ys = [y for _, points in visible for _, y in points]
    x_ticks = ticks(min(xs), max(xs), 5, whole=True)
    y_ticks = ticks(0.0 if chart.from_zero else min(ys), max(ys), 5)
    x_low, x_high = min(min(xs), x_ticks[0]), max(max(xs), x_ticks[-1])
    y_low, y_high = y_ticks[0], y_ticks[-1]
    plane = _Plane(x_low, x_high, y_low, y_high)
    parts = [_grid(plane, y_ticks, chart)]
    for x in x_ticks:
        label = shown(x, x_ticks)
        is_wide = plane.x(x) + _LETTER * len(label) / 2 > WIDTH  # the last one
        place = (WIDTH - 1.0, "end") if is_wide else (plane.x(x), "middle")
        parts.append(_text(place[0], HEIGHT - BOTTOM + 16, label, place[1]))
    for line, points in visible:
        at = [(plane.x(x), plane.y(y)) for x, y in points]
        if line.style != "dots" and len(at) > 1:
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
            dashes = ""
            if line.dashes is not None:
                dash, gap, before = line.dashes
                dashes = f' style="stroke-dasharray: {dash} {gap}; stroke-dashoffset: {-before}"'
            parts.append(f'<path d="{path}" class="line run{shade(line.colour)} {line.style}"{dashes}/>')
        if line.style in ("dots", "marked") or len(at) == 1:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" class="fill run{shade(line.colour)}"/>'
                for x, y in at[line.dash_phase[0] :: line.dash_phase[1]]
            ]
    return _svg_element(chart, parts)


def _bars(chart: Chart) -> str:
    """Return a bar chart, in which the bars of one run are stacked and those of several runs side by side."""
    runs = sorted({bars.colour for bars in chart.bars})
    many = len(chart.labels)
    heights = {
        run: [sum(bars.values[i] for bars in chart.bars if bars.colour == run) for i in range(many)] for run in runs
    }
    y_ticks = ticks(0.0, max(max(column) for column in heights.values()), 5)
    plane = _Plane(0.0, float(many), 0.0, y_ticks[-1])
    parts = [_grid(plane, y_ticks, chart)]
    slot = plane.x(1) - plane.x(0)
    width = min(slot * 0.72, 46.0 * len(runs)) / len(runs)
    for place, run in enumerate(runs):
        stacked = [0.0] * many
        for bars in (each for each in chart.bars if each.colour == run):
            for i, value in enumerate(bars.values):
                left = plane.x(i) + slot / 2 + (place - len(runs) / 2) * width
                top, bottom = plane.y(stacked[i] + value), plane.y(stacked[i])
                stacked[i] += value
                tip = escape(f"{bars.run} {bars.name}, {chart.labels[i]}: {value:.4g} {chart.unit}")
                parts.append(
                    f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(width - 1, 0.5):.1f}" '
                    f'height="{bottom - top:.1f}" class="fill run{shade(run)} {bars.style}"><title>{tip}</title></rect>'
                )
    every = ceil(many * 30 / (WIDTH - LEFT - RIGHT))
    for i in range(0, many, every):
        parts.append(_text(plane.x(i) + slot / 2, HEIGHT - BOTTOM + 16, chart.labels[i], "middle"))
    return _svg_element(chart, parts)


@dataclass(frozen=True)
class _Plane:
    """The ranges of both axes, and the pixel coordinates of values in them."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / ((self.x_high - self.x_low) or 1.0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / ((self.y_high - self.y_low) or 1.0) * (HEIGHT - TOP - BOTTOM)


def _grid(plane: _Plane, y_ticks: list[float], chart: Chart) -> str:
    """Return horizontal grid lines with their labels."""
    parts = []
    for y in y_ticks:
        at = plane.y(y)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
        parts.append(_text(LEFT - 6, at + 4, shown(y, y_ticks, chart.is_percent), "end"))
    return "".join(parts)


def _svg_element(chart: Chart, parts: list[str]) -> str:
    """Return the SVG element of these parts, with the label of the x axis."""
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 6, chart.x_label, "middle"))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}, {escape(chart.unit)}">'
        + "".join(parts)
        + "</svg>"
    )


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def ticks(low: float, high: float, many: int, whole: bool = False) -> list[float]:
    """Return about `many` round, equidistant numbers, from at most `low` to at least `high`.

    With `whole` they are integers.
    """
    if high <= low:
        low, high = (low - 0.5 * abs(low), low + 0.5 * abs(low)) if low else (0.0, 1.0)
    rough = (high - low) / many
    size = 10.0 ** floor(log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    if whole:
        step = max(float(ceil(step)), 1.0)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def shown(value: float, among: list[float], is_percent: bool = False) -> str:
    """Return the label of a tick, with the digits that distinguish it from the others in `among`."""
    scale, suffix = 1.0, ""
    if is_percent:
        scale, suffix = 0.01, "%"
    else:
        most = max(map(abs, among))
        for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
            if most >= size:
                scale, suffix = (1e3 if letter == "k" else size), letter
                break
    step = abs(among[1] - among[0]) / scale if len(among) > 1 else abs(value / scale) or 1.0
    digits = max(0, -floor(log10(step) + 1e-9))
    if abs(round(step, digits) - step) > 1e-9 * step:
        digits += 1
    text = f"{value / scale:,.{min(digits, 6)}f}"
    if float(text.replace(",", "")) == 0:
        return "0%" if is_percent else "0"
    return f"{text}{suffix}"


def smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the mean of the points around each point; of few points, none.

    The window is centred, so that the line has no lag, and narrower near both ends.
    """
    if len(points) < _SMOOTHED:
        return []
    half = max(2, len(points) // (2 * _WINDOWS))
    sums = [0.0, *accumulate(y for _, y in points)]
    means = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        means.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return means


def in_turns(lines: list[Line]) -> list[Line]:
    """Return lines such that those of several runs with the same points all are visible: their dashes alternate."""
    values = [y for line in lines for _, y in line.points]
    tolerance = _ALIKE * (max(values) - min(values)) if values else 0.0
    alike: list[list[int]] = []
    for i, line in enumerate(lines):
        for group in alike:
            first = lines[group[0]]
            if line.name == first.name and _are_alike(line.points, first.points, tolerance):
                group.append(i)
                break
        else:
            alike.append([i])
    phases = {i: (number, len(group)) for group in alike for number, i in enumerate(group)}
    return [line if line.is_empty else replace(line, dash_phase=phases[i]) for i, line in enumerate(lines)]


def _are_alike(some: list[tuple[float, float]], others: list[tuple[float, float]], tolerance: float) -> bool:
    return len(some) == len(others) and all(
        a[0] == b[0] and abs(a[1] - b[1]) <= tolerance for a, b in zip(some, others, strict=True)
    )


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return `points`, or `_POINTS` means of consecutive points if there are more."""
    if len(points) <= _POINTS:
        return points
    size = len(points) / _POINTS
    means = []
    for i in range(_POINTS):
        part = points[int(i * size) : int((i + 1) * size)]
        means.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return means
