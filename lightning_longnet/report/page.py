"""The HTML page of a report: key figures, charts and pictures of one run or several, in one file."""

from __future__ import annotations

from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_longnet.attention.pattern.pattern import Pattern
from lightning_longnet.report.charts import Bars, Chart, Line, shade, svg
from lightning_longnet.report.figures import charts, differing, headline
from lightning_longnet.report.pictures import pattern_pictures, placement_picture
from lightning_longnet.report.runs import Run, read_runs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LENGTHS = ("data.init_args.tokens", "data.tokens")  # settings that hold the length of a sequence
_STYLE = (Path(__file__).parent / "page.css").read_text()


def write_report(
    run_dirs: Sequence[str | Path],
    out: str | Path | None = None,
    images: bool | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Path:
    """Write one HTML file that shows runs side by side, and return its path.

    Args:
        run_dirs: folders of runs.  The report reads metrics.csv and hparams.yaml of CSVLogger, config.yaml of
            LightningCLI and run.json of `RunReport`, where they exist.  For a folder that contains folders `version_N`
            it reads the last of them.
        out: the path of the file; by default `report.html` in the folder of the run, or in the working directory if
            there are several runs.
        images: whether to write PNGs of the charts beside it, such as `report-loss.png`; by default if matplotlib is
            installed.
        report: called after each PNG with the number of those that are written, and of all.
    """
    runs = read_runs(run_dirs)
    path = Path(out) if out is not None else (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
    shown = charts(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(runs, shown))
    has_matplotlib = find_spec("matplotlib") is not None
    if images and not has_matplotlib:
        raise ValueError("images need matplotlib: pip install 'lightning-longnet[plots]', or leave them out")
    if images or (images is None and has_matplotlib):
        from lightning_longnet.report.images import write_images

        write_images(runs, shown, path.with_suffix(""), report)
    return path


def _page(runs: Sequence[Run], shown: Sequence[Chart]) -> str:
    """Return the whole HTML page."""
    title = "Run " + runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _about(runs),
        _table("In figures", headline(runs), runs),
        _charts(shown),
        *(_attention(run, len(runs) > 1) for run in runs),
        _settings(runs),
    ]
    return document(title, parts)


def document(title: str, parts: Sequence[str]) -> str:
    """Return an HTML page with the style of reports."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, parts))
        + "\n</main>\n</body>\n</html>\n"
    )


def _about(runs: Sequence[Run]) -> str:
    """Return a line for each run: its folder, when it began, and the files that were read."""
    lines = []
    for i, run in enumerate(runs):
        started = str(run.record.get("started", "")).replace("T", " ").removesuffix("+00:00")
        details = [str(run.folder), f"begun {started} UTC" if started else "", f"read: {', '.join(run.files)}"]
        mark = f'<i class="key run{shade(i)}"></i><b>{escape(run.name)}</b>: ' if len(runs) > 1 else ""
        lines.append(f"<p>{mark}{escape(', '.join(filter(None, details)))}</p>")
    return f'<div class="about">{"".join(lines)}</div>'


def _table(title: str, rows: Sequence[tuple[str, list[str]]], runs: Sequence[Run]) -> str:
    """Return a section with a table of (name, value for each run), or nothing without rows."""
    if not rows:
        return ""
    head = ""
    if len(runs) > 1:
        names = "".join(f'<th><i class="key run{shade(i)}"></i>{escape(r.name)}</th>' for i, r in enumerate(runs))
        head = f"<thead><tr><th></th>{names}</tr></thead>"
    body = "".join(
        f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{escape(value)}</td>" for value in values) + "</tr>"
        for name, values in rows
    )
    kind = "one" if len(runs) == 1 else "many"
    table = f'<div class="scroll"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'
    return f"<section><h2>{escape(title)}</h2>{table}</section>"


def _charts(shown: Sequence[Chart]) -> str:
    """Return the section of all charts."""
    if not shown:
        return ""
    return f'<section><h2>Over the run</h2><div class="grid">{"".join(map(figure, shown))}</div></section>'


def figure(chart: Chart) -> str:
    """Return a chart with its title and legend."""
    visible: list[Line | Bars] = [line for line in chart.lines if not line.is_empty]
    visible += [bars for bars in chart.bars if not bars.is_empty]
    keys = {each.run: f"run{shade(each.colour)}" for each in visible if each.run}
    # With one run the legend shows the style of each kind in the colour of the run.  With several it shows runs by
    # colour, and kinds by style without a colour
    kinds = {
        each.name: f"{each.style} {'ink' if keys else f'run{shade(each.colour)}'}" for each in visible if each.name
    }
    legend = [f'<span><i class="key {mark}"></i>{escape(name)}</span>' for name, mark in (keys | kinds).items()]
    unit = f' <span class="unit">{escape(chart.unit)}</span>' if chart.unit and not chart.is_percent else ""
    note = f"<p>{escape(chart.note)}</p>" if chart.note else ""
    legend_line = f'<p class="legend">{"".join(legend)}</p>' if legend else ""
    return (
        f'<figure id="{escape(chart.key)}"><figcaption>{escape(chart.title)}{unit}</figcaption>{legend_line}'
        f"{svg(chart)}{note}</figure>"
    )


def _attention(run: Run, is_named: bool) -> str:
    """Return the section about attention: pictures of each pattern of a run, and its placement over ranks."""
    kinds, length = _kinds(run)
    parts = []
    for kind in kinds:
        pattern = Pattern(**kind["pattern"])
        heads, kv_heads, tokens = kind["heads"], kind["kv_heads"], length or 2 * _widest(pattern)
        branches = " + ".join(
            f"({each.segment_length or 'N'}, {each.dilation_rate})"
            + (f" window {each.window}" if each.window else "")
            + (f" {each.sparsity}" if each.sparsity else "")
            for each in pattern.branches
        )
        many = f"{kind['layers']} layer{'s' * (kind['layers'] > 1)}, " if kind.get("layers") else ""
        causal = ", causal" if pattern.is_causal else ""
        parts.append(f'<h3>{escape(f"{many}{heads} heads: {branches}{causal}")}</h3><div class="grid">')
        for caption, picture, shades in pattern_pictures(pattern, tokens, heads, kv_heads):
            legend = "".join(f'<span><i class="key shade{n}"></i>{escape(text)}</span>' for n, text in shades.items())
            parts.append(f'<figure>{picture}<p>{escape(caption)}</p><p class="legend">{legend}</p></figure>')
        if plan := kind.get("plan"):
            parts.append(_placement(plan, pattern, tokens))
        parts.append("</div>")
    if not parts:
        return ""
    title = "What a query sees" + (f": {run.name}" if is_named else "")
    return f'<section class="attention"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def _placement(plan: dict[str, Any], pattern: Pattern, length: int) -> str:
    """Return a picture of the placement of tokens over ranks, with the exchange of each branch."""
    rows = [
        f"{each.segment_length or 'N'}, {each.dilation_rate}: {exchange}"
        for each, exchange in zip(pattern.ordered(), plan["exchanges"], strict=True)
    ]
    sent = sum(plan["sent"]) / 2**20
    note = (
        f"{len(plan['pairs'])} ranks, {plan['placement']}. Exchange by branch: {'; '.join(rows)}. "
        f"A layer sends {sent:.2f} MiB a step, all ranks together. Why, by the busiest rank: {plan['why']}."
    )
    picture = placement_picture(plan, length)
    return f"<figure><figcaption>Placement over ranks</figcaption>{picture}<p>{escape(note)}</p></figure>"


def _kinds(run: Run) -> tuple[list[dict[str, Any]], int]:
    """Return the kinds of attention layers of a run and the length of its sequences, which is 0 if it is unknown.

    They are read from run.json, or else from the first pattern in the settings.  A kind has the keys pattern, heads and
    kv_heads, and in run.json also layers and plan.
    """
    if run.record.get("attention"):
        return run.record["attention"], int(run.record.get("tokens") or 0)
    for path, value in run.settings.items():
        if isinstance(value, dict) and "branches" in value:
            section = path.rpartition(".")[0]
            heads = run.settings.get(f"{section}.heads" if section else "heads")
            heads = heads if isinstance(heads, int) else max(each.dilation_rate for each in Pattern(**value).branches)
            kv_heads = run.settings.get(f"{section}.kv_heads" if section else "kv_heads")
            tokens = next((run.settings[key] for key in _LENGTHS if key in run.settings), None)
            kind = {"pattern": value, "heads": heads, "kv_heads": kv_heads if isinstance(kv_heads, int) else heads}
            return [kind], tokens if isinstance(tokens, int) else 0
    return [], 0


def _widest(pattern: Pattern) -> int:
    """Return the longest segment or window of a pattern."""
    return max(each.segment_length or each.window or 32 for each in pattern.branches)


def _settings(runs: Sequence[Run]) -> str:
    """Return the table of settings, folded if there is one run."""
    rows = differing(runs)
    if not rows:
        return ""
    title = "Settings" if len(runs) == 1 else "Settings that differ"
    table = _table(title, rows, runs)
    return f"<details><summary>{escape(title)}</summary>{table}</details>" if len(runs) == 1 else table
