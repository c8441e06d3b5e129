"""Plots of a result of attention.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def float32_tensors(row: dict[str, Any], machine: dict[str, Any]) -> float:
    """Return the peak memory in units of a float32 tensor of the shape of q."""
    return float(row["peak_mib"] * 2**20 / (row["tokens"] * machine["heads"] * machine["head_dim"] * 4))


def draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    machine, names = result["machine"], list(dict.fromkeys(row["pattern"] for row in result["rows"]))
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, len(names), sharex=True, squeeze=False)
    colours = {
        "lightning-longnet": "#b3321f",
        "lightning-longnet, blocked": "#e2917f",
        "torchscale": "#2b5d8a",
        "torchscale, routed": "#7fa8cc",
        "dilated-attention-pytorch": "#6b8f3c",
        "dense": "#555555",
        "dense, routed": "#aaaaaa",
        "lightning-longnet, padded": "#8c6bb1",
        "lightning-longnet, dropout 0.1": "#d9a441",
        "lightning-longnet, flash": "#2a9d8f",
        "lightning-longnet, sdpa": "#f4a261",
        "lightning-longnet, cudnn": "#4895ef",
        "lightning-longnet, eager": "#bc6c25",
    }
    for column, name in zip(axes.T, names, strict=True):
        for axis, title in zip(column, ("tokens / s", "peak, float32 tensors of (N, H, D)"), strict=True):
            for dtype, line in (("float32", "-"), ("bfloat16", ":")):
                for participant, colour in colours.items():
                    rows = [
                        r
                        for r in result["rows"]
                        if (r["pattern"], r["dtype"], r["participant"]) == (name, dtype, participant)
                    ]
                    rows.sort(key=lambda r: r["tokens"])
                    points = (
                        [r["tokens"] for r in rows],
                        [
                            r["tokens_per_second"] if title == "tokens / s" else float32_tensors(r, result["machine"])
                            for r in rows
                        ],
                    )
                    if not rows:
                        continue
                    label = participant if dtype == "float32" else None
                    axis.plot(*points, line, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=label)
            axis.set_xscale("log", base=2)
            axis.set_ylabel(title)
            axis.grid(alpha=0.25)
            axis.set_ylim(bottom=0)
        column[0].set_title(name)
        halves = any(r["dtype"] == "bfloat16" for r in result["rows"])
        column[1].set_xlabel("tokens (dotted: bfloat16)" if halves else "tokens")
    handles, labels = axes[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    shape = f"{machine['heads']} heads of {machine['head_dim']}"
    figure.suptitle(
        f"forward + backward, causal, {shape}; {machine.get('gpu') or machine['cpu']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
