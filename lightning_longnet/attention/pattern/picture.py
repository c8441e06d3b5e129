"""Figures of patterns, and of the work and the traffic of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_longnet.attention.pattern.pattern import Branch, Pattern

PANELS = 4


def draw_pattern(pattern: Pattern, length: int | None, heads: int | None, kv_heads: int | None) -> Figure:
    """Return a figure of how often each query counts each key, a panel for each of the first kinds of head.

    `Pattern.plot` calls it.  By default `length` is two of the longest segments, 64 at most, and there are as many
    heads as the largest dilation rate.
    """
    try:
        from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError("plot needs matplotlib: pip install matplotlib") from missing

    widest = max(branch.segment_length or 1 for branch in pattern.branches)
    length = min(2 * widest, 64) if length is None else length
    if length > 1024:
        raise ValueError(f"length must be at most 1024, a pixel a token, got {length}: draw a smaller pattern")
    heads = max(branch.dilation_rate for branch in pattern.branches) if heads is None else heads
    counts = pattern.mask(length, heads, kv_heads)
    # heads that see the same are drawn once
    by_mask: dict[bytes, list[int]] = {}
    for head in range(heads):
        by_mask.setdefault(counts[head].numpy().tobytes(), []).append(head)
    alike = list(by_mask.values())
    shown = alike[:PANELS]
    most = int(counts.max())
    # from masked to counted most: legible in print and for the colour-blind
    ramp = LinearSegmentedColormap.from_list("", ["#f4f1ea", "#f2b872", "#d9683c", "#93295a", "#3b1f5c", "#120b2e"])
    colours = [ramp(n / max(most, 2)) for n in range(most + 1)]
    figure = Figure(figsize=(2.9 * len(shown) + 1.1, 3.7), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, members in zip(axes, shown, strict=True):
        image = axis.imshow(
            counts[members[0]].numpy(),
            cmap=ListedColormap(colours),
            norm=BoundaryNorm([n - 0.5 for n in range(most + 2)], most + 1),
            interpolation="nearest",
        )
        names = ", ".join(map(str, members[:4])) + (", ..." if len(members) > 4 else "")
        axis.set_title(f"head{'s' if len(members) > 1 else ''} {names}", fontsize=9)
        axis.set_xlabel("key", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("query", fontsize=8)
    bar = figure.colorbar(image, ax=axes, ticks=range(most + 1), shrink=0.85, pad=0.02)
    bar.set_label("times counted", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    title = " + ".join(map(_branch_title, pattern.branches)) + (", causal" if pattern.is_causal else "")
    if more := len(alike) - len(shown):
        title += f"   ({more} more kinds of head)"
    figure.suptitle(title, fontsize=9)
    return figure


def _branch_title(branch: Branch) -> str:
    """Return the short name of a branch for a title."""
    parts = []
    if branch.segment_length is not None or branch.window is None:
        parts.append(f"({branch.segment_length or 'N'}, {branch.dilation_rate})")
    if branch.window is not None:
        parts.append(f"window {branch.window}")
    if branch.sparsity is not None:
        parts.append(str(branch.sparsity))
    if branch.has_null_keys:
        parts.append("zero keys")
    return " ".join(parts)


def draw_ranks(
    received: tuple[tuple[int, ...], ...], pairs: tuple[int, ...], placement: str, exchanges: tuple[str, ...]
) -> Figure:
    """Return a figure of the keys and values sent between ranks, and of the pairs of each rank beside their mean.

    `SequencePlan.plot` calls it.

    Args:
        received: the bytes that rank a receives from rank b, `received[a][b]`.
        pairs: the number of (query, key) pairs of each rank.
        placement, exchanges: the kind of the placement and the exchange of each branch, for the titles.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError("plot needs matplotlib: pip install matplotlib") from missing

    ranks = len(pairs)
    if ranks > 256:
        raise ValueError(f"a plan of at most 256 ranks can be drawn, got {ranks}: print it")
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    travel, work = figure.subplots(1, 2, width_ratios=(1, 1.1))
    mib = [[cell / 2**20 for cell in row] for row in received]
    image = travel.imshow(mib, cmap="YlOrRd", vmin=0, aspect="equal")
    figure.colorbar(image, ax=travel, label="MiB", shrink=0.85)
    if ranks <= 8:
        for row, cells in enumerate(mib):
            for column, cell in enumerate(cells):
                if cell:
                    dark = cell > 0.6 * max(map(max, mib))
                    travel.text(
                        column,
                        row,
                        f"{cell:.2g}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if dark else "black",
                    )
    travel.set(xlabel="keys and values of rank", ylabel="received by rank")
    title = "nothing travels" if not any(map(any, mib)) else "keys and values received, forward"
    if "swap" in exchanges:
        title = f"tokens are traded for heads: {title}"
    travel.set_title(title, fontsize=10)
    mean = sum(pairs) / ranks
    work.bar(range(ranks), [count / mean if mean else 0 for count in pairs], color="#b3321f", width=0.7)
    work.axhline(1, color="#555555", linewidth=1, linestyle="--")
    work.set(xlabel="rank", ylabel="pairs computed, of the mean", ylim=(0, None))
    work.set_title(f"{placement}, {' + '.join(dict.fromkeys(exchanges))}", fontsize=10)
    work.spines[["top", "right"]].set_visible(False)
    for axis in (travel.xaxis, travel.yaxis, work.xaxis):
        axis.get_major_locator().set_params(integer=True)
    return figure
