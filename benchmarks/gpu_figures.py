"""The figures and plots of the records that `make gpu` wrote; without a record every figure is "not measured"."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Row = dict[str, Any]
HEAD_DIMS, LENGTHS = (64, 128), (2**16, 2**18, 2**20, 2**22)
# tokens a second that the ancestor of this package publishes: of its best class, and of its ring
ANCESTOR = {4096: (565_618, 61_261), 8192: (382_531, 80_491)}
ABSENT = "not measured"
_NAMES = {
    "sdpa": "torch's flash op",
    "cudnn": "cuDNN",
    "flash": "flash-attn 2",
    "hub": "flash-attn 2 of the kernels hub",
    "flash3": "FA3",
    "flash4": "FA4",
}


def figures(folder: Path) -> str:
    """Return a Markdown table of the figures with their goals, and a column for each record in a folder."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("gpu-*.json"))]
    heads = [f"{record['machine']['gpu']}, torch {record['machine']['versions']['torch']}" for record in records]
    columns = [list(_figures(results_of(record))) for record in records or [{"units": {}}]]
    lines = [f"| | goal | {' | '.join(heads or ['measured'])} |", "|---" * (2 + max(1, len(heads))) + "|"]
    for cells in zip(*columns, strict=True):
        name, goal, _ = cells[0]
        lines.append(f"| {name} | {goal} | {' | '.join(value for *_, value in cells)} |")
    return "\n".join(lines)


def results_of(record: dict[str, Any]) -> list[Row]:
    """Return the results of a record's units that passed, with the kind of each."""
    rows = record["units"].values()
    return [{"kind": row["kind"], **row["result"]} for row in rows if row["status"] == "passed" and "result" in row]


def _figures(rows: list[Row]) -> Iterator[tuple[str, str, str]]:
    """Yield (name, goal, value) of each figure."""
    for head_dim in HEAD_DIMS:
        ours = [_best(rows, tokens, head_dim) for tokens in LENGTHS]
        for phase, words, goals in (
            ("forward", "forward", (0.95, 0.7)),
            ("step", "forward and backward", (0.7, 0.5)),
        ):
            for op, goal in (("sdpa", goals[0]), ("cudnn", goals[1]), ("flash3", None), ("flash4", None)):
                name = f"{words}, heads of {head_dim}, over dense {_NAMES[op]}"
                ratios = [_over_dense(rows, row, op, f"{phase}_tflops") for row in ours]
                yield name, f"{goal} x" if goal else "reported", _range(ratios, "{:.2f} x")
        scheme = [_over_scheme(rows, row) for row in ours]
        yield f"step, heads of {head_dim}, over torchscale's scheme on the same ops", "2 x", _range(scheme, "{:.2f} x")
        yield (
            f"slowest over fastest tokens/s from 64k to 4M, heads of {head_dim}",
            "0.95",
            _flat([row and row["step_tokens_per_second"] for row in ours]),
        )
    yield "step of the 125M model at 1,048,576 tokens on one GPU", "fits", _long_step(rows)
    for tokens, (best, ring) in ANCESTOR.items():
        published = f"{best:,} (the ancestor's best), {ring:,} (its ring)"
        found = [row for row in rows if row["kind"] == "ancestor" and row["tokens"] == tokens]
        shown = [
            f"{row['dtype']}: {row['forward_tokens_per_second']:,} forward, {row['step_tokens_per_second']:,} in all"
            for row in found
        ]
        yield f"tokens/s at {tokens:,}", published, "; ".join(shown) or ABSENT


def _best(rows: list[Row], tokens: int, head_dim: int) -> Row | None:
    """Return the row of our fastest kernel at a length, or None."""
    found = [
        row
        for row in rows
        if (row["kind"], row.get("tokens"), row.get("head_dim")) == ("attention", tokens, head_dim)
        and " " not in row["participant"]
        and "step_tflops" in row
    ]
    return max(found, key=lambda row: float(row["step_tflops"]), default=None)


def _over_dense(rows: list[Row], ours: Row | None, op: str, key: str) -> float | None:
    """Return the rate of a row over that of dense attention: of torch's op, that in the row's own process."""
    if ours is None:
        return None
    if op == "sdpa":
        beside = ours.get("beside")
        return None if beside is None else float(ours[key] / beside[key])
    found = [
        float(row[key])
        for row in rows
        if (row["kind"], row.get("participant")) == ("dense", f"dense {op}")
        and row["head_dim"] == ours["head_dim"]
        and key in row
    ]
    return float(ours[key]) / max(found) if found else None


def _over_scheme(rows: list[Row], ours: Row | None) -> float | None:
    """Return how much faster than the fastest of torchscale's schemes a row's step is."""
    if ours is None:
        return None
    found = [
        float(row["step_seconds"])
        for row in rows
        if row["kind"] == "attention"
        and row["participant"].startswith("scheme")
        and (row["tokens"], row["head_dim"]) == (ours["tokens"], ours["head_dim"])
        and "step_seconds" in row
    ]
    return min(found) / float(ours["step_seconds"]) if found else None


def _range(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ABSENT
    low, high = form.format(min(known)), form.format(max(known))
    return low if low == high else f"{low} to {high}"


def _flat(values: list[Any]) -> str:
    known = [float(value) for value in values if value]
    return f"{min(known) / max(known):.2f}" if len(known) == len(LENGTHS) else ABSENT


def _long_step(rows: list[Row]) -> str:
    found = [row for row in rows if row["kind"] == "step" and row["tokens"] == 2**20]
    if not found:
        return ABSENT
    if "out_of_memory" in found[0]:
        return "does not fit"
    return "{step_seconds:.2f} s, {tokens_per_second:,} tokens/s, {peak_gib:.1f} GiB".format(**found[0])


def draw(path: Path) -> list[Path]:
    """Draw the plots of a record beside it, those for which it has results, and return their paths."""
    record = json.loads(path.read_text())
    rows, machine = results_of(record), record["machine"]
    title = f"{machine['gpu']}, driver {machine['driver']}, torch {machine['versions']['torch']}, bfloat16"
    plots: dict[str, tuple[str, Callable[[list[Row], str, Path], None]]] = {
        "attention": ("attention", _draw_attention),
        "step": ("step", _draw_steps),
    }
    drawn = []
    for name, (kind, call) in plots.items():
        shown = [row for row in rows if row["kind"] in (kind, "dense") and "out_of_memory" not in row]
        if any(row["kind"] == kind for row in shown):
            drawn.append(path.with_name(f"{path.stem}-{name}.png"))
            call(shown, title, drawn[-1])
    return drawn


def _draw_attention(rows: list[Row], title: str, path: Path) -> None:
    """Draw the rates against the length, of each width of a head, forward, and forward and backward."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.4), layout="constrained")
    axes = figure.subplots(2, len(HEAD_DIMS), sharex=True, squeeze=False)
    names = list(dict.fromkeys(row["participant"] for row in rows))
    for column, head_dim in zip(axes.T, HEAD_DIMS, strict=True):
        for axis, key in zip(column, ("forward_tflops", "step_tflops"), strict=True):
            for place, name in enumerate(names):
                own = [row for row in rows if (row["participant"], row["head_dim"]) == (name, head_dim)]
                points = sorted((row["tokens"], row[key]) for row in own)
                style = "--" if name.startswith("dense") else ":" if name.startswith("scheme") else "-"
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=f"C{place % 10}", marker="o", ms=3.5, label=name)
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.25)
        column[0].set_title(f"heads of {head_dim}")
        column[1].set_xlabel("tokens")
    for axis, phase in zip(axes[:, 0], ("forward", "forward and backward"), strict=True):
        axis.set_ylabel(f"{phase}, TFLOP/s of distinct pairs")
    shown = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def _draw_steps(rows: list[Row], title: str, path: Path) -> None:
    """Draw the parts of a step against the length, in microseconds a token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 4.4), layout="constrained")
    axis = figure.subplots()
    steps = sorted((row for row in rows if row["kind"] == "step"), key=lambda row: int(row["tokens"]))
    names, below = [f"{row['tokens']:,}" for row in steps], [0.0] * len(steps)
    for part in steps[0]["parts"]:
        heights = [1e6 * row["parts"][part] / row["tokens"] for row in steps]
        axis.bar(names, heights, bottom=below, label=part)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axis.set_xlabel("tokens")
    axis.set_ylabel("microseconds a token")
    axis.legend(frameon=False, fontsize=9)
    axis.set_title(f"a step of the 125M model; {title}", fontsize=9)
    figure.savefig(path, dpi=120)
