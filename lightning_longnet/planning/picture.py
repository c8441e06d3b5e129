"""The picture of a plan: what a rank holds, what each branch sends, and where a step's time goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_longnet.planning.table import WORDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_longnet.planning.run import RunPlan

_COLOURS = ("#2b5d8a", "#7fa8cc", "#6b8f3c", "#d9a441", "#b3321f", "#8c6bb1", "#999999")


def draw(plan: RunPlan) -> Figure:
    """Return a figure of a plan."""
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError("a picture needs matplotlib: pip install matplotlib") from missing

    figure = Figure(figsize=(10, 5.6), layout="constrained")
    held, sent, time = figure.subplots(3, 1, height_ratios=(1, 1.6, 1))
    usable = plan.usable / 2**30
    kinds = {WORDS[name]: many / 2**30 for name, many in plan.memory.kinds.items()}
    title = f"memory of rank {plan.fullest} at its fullest, {plan.memory.peak / 2**30:.2f} of {usable:.1f} GiB"
    _stacked(held, kinds, "GiB", title)
    if plan.memory.peak > usable / 2:
        held.axvline(usable, color="#b3321f", linestyle="--", linewidth=1.2)
    kind = plan.kinds[0]
    share = max(kind.shares.values(), key=lambda each: each.volume.sent_bytes)
    branches = kind.pattern.ordered()
    names = [f"{branch.segment_length or 'all'} / {branch.dilation_rate}" for branch in branches]
    many = share.branch_bytes or (share.volume.sent_bytes / len(names),) * len(names)
    sent.barh(names, [each / 2**20 for each in many], color="#2b5d8a", height=0.7)
    sent.invert_yaxis()
    sent.set_xlabel("MiB", fontsize=8)
    sent.set_xlim(0, None if any(many) else 1)
    exchanges = " + ".join(dict.fromkeys(kind.schedule.exchanges))
    words = f"sent for each branch in a layer, {exchanges}" if any(many) else "no branch sends anything"
    sent.set_title(words, fontsize=9)
    step = plan.time
    parts = {
        "linear maps": step.linear,
        "attention": step.attention,
        "other operators": step.other,
        "waits for keys": step.exchange,
        "waits for the engine": step.gradients,
        "optimiser": step.optimizer,
    }
    seconds = {name: 1e3 * each for name, each in parts.items()}
    title = f"a step, {1e3 * step.seconds:,.0f} ms: {plan.tokens_per_second:,.0f} tokens a second, MFU {plan.mfu:.1%}"
    _stacked(time, seconds, "ms", title)
    for axis in (held, sent, time):
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    ranks = f"{plan.job.ranks:,} x {plan.device.name}"
    figure.suptitle(f"{plan.weights.parameters:,} parameters, {plan.job.tokens:,} tokens, {ranks}", fontsize=10)
    return figure


def _stacked(axis: Axes, parts: dict[str, float], unit: str, title: str) -> None:
    """Draw one bar of parts side by side, without those of no width."""
    left = 0.0
    for (name, width), colour in zip(parts.items(), _COLOURS, strict=False):
        if width:
            axis.barh([0], [width], left=left, color=colour, height=0.6, label=name)
            left += width
    axis.set_yticks([])
    axis.set_ylim(-0.4, 0.4)
    axis.set_xlabel(unit, fontsize=8)
    axis.set_title(title, fontsize=9)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7, frameon=False)
