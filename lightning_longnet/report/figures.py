"""The content of a report: the table of key figures, and the charts."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from lightning_longnet.report.charts import Bars, Chart, Line, in_turns, smoothed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_longnet.report.runs import Points, Run

LOSS = (("train/loss", "train_loss", "train/loss_step", "train_loss_step", "loss"), ("val/loss", "val_loss"))
BITS = (("train/bits_per_byte",), ("val/bits_per_byte",))
KINDS = ("parameters", "gradients", "optimizer", "exchange", "activations")
_OTHERS = 12  # maximal number of charts of metrics that this package does not log


def headline(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return (figure, its text for each run); figures that no run has are left out."""
    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("validation, bits per byte", lambda run: _figure(run.last(*BITS[1]), "{:.3f}")),
        ("training, bits per byte", lambda run: _figure(run.last(*BITS[0]), "{:.3f}")),
        ("validation loss", lambda run: _figure(run.last(*LOSS[1]), "{:.4f}")),
        ("training loss", lambda run: _figure(run.last(*LOSS[0]), "{:.4f}")),
        ("validation perplexity", lambda run: _figure(run.last("val/perplexity"), "{:.2f}")),
        ("tokens a second, median", lambda run: _median(run, "throughput/tokens_per_second", "{:,.0f}")),
        ("seconds a step, median", lambda run: _median(run, "throughput/step_seconds_mean", "{:.3f}")),
        ("MFU, median", lambda run: _median(run, "throughput/mfu", "{:.1%}")),
        ("HFU, median", lambda run: _median(run, "throughput/hfu", "{:.1%}")),
        ("peak memory of a rank", lambda run: _figure(run.last("memory/peak_gib_max"), "{:.2f} GiB")),
        ("sent for attention a step", lambda run: _bytes(run.last("exchange/sent_bytes"))),
        ("exchange hidden behind compute", lambda run: _median(run, "exchange/hidden_share", "{:.0%}")),
        ("tokens seen", lambda run: _figure(run.last("throughput/tokens"), "{:,.0f}")),
        ("steps skipped", lambda run: _figure(run.last("guard/skipped_steps") or None, "{:.0f}")),
        ("steps", lambda run: _figure(run.record.get("steps"), "{:,}")),
        ("parameters", lambda run: _figure(run.record.get("parameters"), "{:,}")),
        ("tokens of a sequence", lambda run: _figure(run.record.get("tokens") or None, "{:,}")),
        ("ranks, data x sequence parallel", _mesh),
        ("engine, precision", _engine),
        ("device", lambda run: str(run.record.get("device", ""))),
        ("time", lambda run: _time(run.record.get("seconds"))),
        ("ended", lambda run: str(run.record.get("status", ""))),
    ]
    texts = [(name, [of(run) for run in runs]) for name, of in rows]
    return [(name, values) for name, values in texts if any(values)]


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts for which at least one run has data."""
    candidates = [
        _learning(runs, "bits", "Bits per byte", "bits/byte", BITS),
        _learning(runs, "loss", "Loss", "nats/token", LOSS),
        _one(runs, "throughput", "Throughput, all ranks", "tokens/s", "throughput/tokens_per_second"),
        _several(
            runs,
            "steps",
            "Time of a step",
            "seconds",
            [("p50", "throughput/step_seconds_p50", "solid"), ("p90", "throughput/step_seconds_p90", "dashed")],
        ),
        _several(
            runs,
            "utilization",
            "Of the devices' peak",
            "share",
            [("MFU", "throughput/mfu", "solid"), ("HFU", "throughput/hfu", "dashed")],
            is_percent=True,
        ),
        _by_rank(runs),
        _by_kind(runs),
        _several(
            runs,
            "memory",
            "Peak memory of the ranks",
            "GiB",
            [("most", "memory/peak_gib_max", "solid"), ("least", "memory/peak_gib_min", "dashed")],
        ),
        _several(
            runs,
            "exchange",
            "Exchange of attention, a step",
            "seconds",
            [("on the way", "exchange/flight_seconds", "solid"), ("waited for", "exchange/waited_seconds", "dashed")],
            note="What lies between the lines was hidden behind compute.",
        ),
        _one(runs, "hidden", "Exchange hidden behind compute", "share", "exchange/hidden_share", is_percent=True),
        _several(
            runs,
            "bytes",
            "Sent for attention, a step",
            "MiB",
            [("sent", "exchange/sent_bytes", "solid"), ("the plan", "exchange/predicted_bytes", "dots")],
            factor=2**-20,
        ),
        *_others(runs),
    ]
    return [_in_turns(chart) for chart in candidates if not chart.is_empty]


def _in_turns(chart: Chart) -> Chart:
    """Return a chart whose equal lines are all visible, with a note of the runs that they are of."""
    lines = in_turns(chart.lines)
    equal = dict.fromkeys(line.run for line in lines if line.dash_phase[1] > 1)
    if not equal:
        return chart
    note = f"Lines of {', '.join(equal)} that are equal are drawn in alternating dashes."
    return replace(chart, lines=lines, note=" ".join(filter(None, (chart.note, note))))


def differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return (setting, its text for each run) of the settings that differ between runs, or all settings of one run."""
    keys = sorted({key for run in runs for key in run.settings})
    rows = [(key, [_setting(run.settings.get(key)) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(runs) == 1 or len(set(values)) > 1]


def _learning(
    runs: Sequence[Run], key: str, title: str, unit: str, keys: tuple[tuple[str, ...], tuple[str, ...]]
) -> Chart:
    """Return a chart of training and validation values; `keys` are the names that each may have in the metrics."""
    lines = []
    for i, run in enumerate(runs):
        training, run_name = run.points(*keys[0]), _legend_of(runs, run)
        mean = smoothed(training)
        lines.append(Line("training", training, i, "faint" if mean else "solid", run_name))
        lines.append(Line("training, smoothed", mean, i, "solid", run_name))
        lines.append(Line("validation", run.points(*keys[1]), i, "marked", run_name))
    return Chart(key, title, unit, lines)


def _one(runs: Sequence[Run], key: str, title: str, unit: str, series: str, is_percent: bool = False) -> Chart:
    """Return a chart of one metric."""
    lines = [Line("", run.points(series), i, run=_legend_of(runs, run)) for i, run in enumerate(runs)]
    return Chart(key, title, unit, lines, from_zero=True, is_percent=is_percent)


def _several(
    runs: Sequence[Run],
    key: str,
    title: str,
    unit: str,
    kinds: list[tuple[str, str, str]],
    factor: float = 1.0,
    is_percent: bool = False,
    note: str = "",
) -> Chart:
    """Return a chart of several metrics, each (name in the legend, name of the metric, style)."""
    lines = [
        Line(word, [(x, y * factor) for x, y in run.points(series)], i, style, _legend_of(runs, run))
        for i, run in enumerate(runs)
        for word, series, style in kinds
    ]
    return Chart(key, title, unit, lines, from_zero=True, is_percent=is_percent, note=note)


def _by_rank(runs: Sequence[Run]) -> Chart:
    """Return a bar chart of the peak memory of each rank."""
    peaks = [(i, run, run.record.get("by_rank", {}).get("peak", [])) for i, run in enumerate(runs)]
    most = max((len(values) for *_, values in peaks), default=0)
    bars = [
        Bars("", [x / 2**30 for x in values] + [0.0] * (most - len(values)), i, run=_legend_of(runs, run))
        for i, run, values in peaks
        if values
    ]
    return Chart(
        "memory-ranks", "Peak memory by rank", "GiB", bars=bars, labels=list(map(str, range(most))), x_label="rank"
    )


def _by_kind(runs: Sequence[Run]) -> Chart:
    """Return a bar chart of the memory of parameters, gradients, optimiser, exchange and activations."""
    bars = []
    for i, run in enumerate(runs):
        memory = [run.last(f"memory/{kind}_gib") for kind in KINDS]
        if any(x is not None for x in memory):
            bars.append(Bars("", [1024 * (x or 0.0) for x in memory], i, run=_legend_of(runs, run)))
    labels = ["param.", "grad.", "optim.", "exch.", "activ."]
    return Chart("memory-kinds", "Memory by kind", "MiB", bars=bars, labels=labels, x_label="of the fullest rank")


def _others(runs: Sequence[Run]) -> list[Chart]:
    """Return charts of the metrics that have no chart otherwise."""
    ours = {name for group in (*LOSS, *BITS) for name in group}
    prefixes = ("throughput/", "memory/", "exchange/", "guard/")
    keys = sorted({key for run in runs for key in run.series if key not in ours and not key.startswith(prefixes)})
    others = []
    for key in keys[:_OTHERS]:
        lines = [Line("", run.points(key), i, run=_legend_of(runs, run)) for i, run in enumerate(runs)]
        others.append(Chart("other-" + "".join(c if c.isalnum() else "-" for c in key), key, "", lines))
    return others


def _legend_of(runs: Sequence[Run], run: Run) -> str:
    """Return the name of the run for a legend, or an empty text for a single run."""
    return run.name if len(runs) > 1 else ""


def _figure(value: Any, shape: str) -> str:
    """Return a value in the format `shape`, or an empty text for None."""
    return "" if value is None else shape.format(value)


def _median(run: Run, key: str, shape: str) -> str:
    """Return the median of a metric over the run, in the format `shape`."""
    points: Points = run.points(key)
    if not points:
        return _figure(run.last(key), shape)
    return shape.format(median(y for _, y in points))


def _bytes(value: float | None) -> str:
    if value is None:
        return ""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"


def _mesh(run: Run) -> str:
    if "ranks" not in run.record:
        return ""
    return f"{run.record['ranks']}, {run.record['data_parallel']} x {run.record['sequence_parallel']}"


def _engine(run: Run) -> str:
    return ", ".join(str(run.record[key]) for key in ("strategy", "precision") if key in run.record)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    hours, rest = divmod(round(seconds), 3600)
    return (
        f"{hours} h {rest // 60} min"
        if hours
        else f"{rest // 60} min {rest % 60} s"
        if rest >= 60
        else f"{seconds:.1f} s"
    )


def _setting(value: Any) -> str:
    """Return the text of a setting; a pattern is shown by its segment lengths and dilation rates."""
    if isinstance(value, dict) and "branches" in value:
        return " + ".join(
            f"({each.get('segment_length') or 'N'}, {each.get('dilation_rate', 1)})"
            + (f" window {each['window']}" if each.get("window") else "")
            for each in value["branches"]
        )
    return "" if value is None else str(value)
