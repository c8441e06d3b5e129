"""Pictures, as SVG, of the keys that each query attends to and of the placement of a sequence over ranks."""

from __future__ import annotations

from functools import lru_cache
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.pattern.pattern import Pattern

_CELLS = 96  # rows and columns of the picture of a whole sequence
_SAMPLED = 32  # maximal number of tokens of each row or column that are sampled
_CLOSE = 48  # tokens in the picture of the first tokens
_SHADES = 6
_HEADS = 16  # maximal number of heads that are sampled


@lru_cache(16)
def whole_shares(pattern: Pattern, length: int, heads: int) -> Tensor:
    """Return (cells, cells): the share of the (query, key) pairs of each cell that attend, as the mean over the heads.

    It is measured on the first `_SAMPLED` tokens of each row and column of cells, and on the first `_HEADS` heads.
    """
    cells = min(_CELLS, length)
    begins = torch.arange(cells) * length // cells
    widths = torch.diff(begins, append=torch.tensor([length])).clamp(max=_SAMPLED)
    tokens = torch.cat([torch.arange(b, b + w) for b, w in zip(begins.tolist(), widths.tolist(), strict=True)])
    owner = torch.repeat_interleave(torch.arange(cells), widths)
    shares = torch.zeros(cells, cells)
    for head in range(min(heads, _HEADS)):
        shares += _pooled(_seen(pattern, tokens, length, head, heads), owner, cells)
    return shares / min(heads, _HEADS) / (widths[:, None] * widths)


def _seen(pattern: Pattern, tokens: Tensor, length: int, head: int, heads: int) -> Tensor:
    """Return bools (N, N): whether token i of `tokens` (N,) attends to token j, in one head, by the definition.

    `length` is the number of tokens of the whole sequence.
    """
    attends = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for branch in pattern.branches:
        segment, place = tokens * 0, tokens
        if branch.segment_length is not None:
            segment, place = tokens // branch.segment_length, tokens % branch.segment_length
        is_member = place % branch.dilation_rate == branch.offset(head, heads)
        seen = is_member[:, None] & is_member & (segment[:, None] == segment)
        distance = tokens[:, None] - tokens
        if branch.is_causal:
            seen &= distance >= 0
        if branch.window is not None:
            seen &= distance.abs() < branch.window
        if branch.sparsity is not None:
            seen &= branch.keeps(tokens, torch.full_like(tokens, length), head, heads)
        attends |= seen
    return attends


def _pooled(seen: Tensor, owner: Tensor, cells: int) -> Tensor:
    """Return (cells, cells), the sums of `seen` (N, N) over cells; `owner` (N,) is the cell of each token."""
    rows = torch.zeros(cells, len(seen)).index_add_(0, owner, seen.float())
    return torch.zeros(cells, cells).index_add_(1, owner, rows)


class Picture(NamedTuple):
    """A picture as SVG, with its caption and, for its legend, the text of each shade that it may show."""

    caption: str
    svg: str
    shades: dict[int, str]


def pattern_pictures(pattern: Pattern, length: int, heads: int, kv_heads: int) -> list[Picture]:
    """Return two pictures: `length` tokens in all heads, and the first of them in head 0.

    The shades are named by a legend: on a dark page they grow brighter, and on a light one darker.
    """
    shares = whole_shares(pattern, length, kv_heads)
    # consecutive thresholds differ by a factor of 4: dilation rate r keeps 1 / r**2 of the pairs
    levels = torch.zeros_like(shares, dtype=torch.long)
    for level in range(1, _SHADES):
        levels += shares > 2.0 ** -(2 * (_SHADES - 1 - level) + 1)
    levels = torch.where(shares > 0, levels.clamp(min=1), 0)
    shades = {level: f"up to 1/{2 ** (2 * (_SHADES - 1 - level) - 1)}" for level in range(1, _SHADES - 1)}
    shades[_SHADES - 1] = "more"
    caption = f"A sequence of {length:,} tokens: the share of the pairs that is seen, over all heads."
    pictures = [Picture(caption, _matrix(levels, length, "key", "query"), shades)]
    close = min(_CLOSE, length)
    counts = pattern.mask(close, heads, kv_heads)[0]
    most = max(int(counts.max()), 1)
    levels = torch.where(counts > 0, (counts * (_SHADES - 1) / most).ceil().long(), 0)
    shades = {}
    for count in range(1, most + 1):
        level = -(-count * (_SHADES - 1) // most)
        shades[level] = f"{shades[level].partition(' ')[0]} to {count}" if level in shades else str(count)
    caption = f"The first {close} tokens close up, head 0: how many times each key is counted."
    if pattern.has_null_keys:
        caption += " The zeros that pad segments are not drawn."
    pictures.append(Picture(caption, _matrix(levels, close, "key", "query"), shades))
    return pictures


def _matrix(levels: Tensor, length: int, across: str, down: str) -> str:
    """Return a square picture of `levels` (n, n), in which 0 is empty.

    Adjacent cells of one level in a row are merged, and each level is one path, which keeps the SVG small.
    """
    side, left, top, size = len(levels), 56.0, 10.0, 300.0
    unit = size / side
    paths: dict[int, list[str]] = {}
    for row, values in enumerate(levels.tolist()):
        begin = 0
        while begin < side:
            end = begin
            while end < side and values[end] == values[begin]:
                end += 1
            if values[begin]:
                x, y, width = left + begin * unit, top + row * unit, (end - begin) * unit
                paths.setdefault(values[begin], []).append(f"M{x:.2f} {y:.2f}h{width:.2f}v{unit:.2f}H{x:.2f}z")
            begin = end
    parts = [f'<rect x="{left}" y="{top}" width="{size}" height="{size}" class="ground"/>']
    parts += [f'<path d="{"".join(path)}" class="shade{level}"/>' for level, path in sorted(paths.items())]
    for share in (0.0, 0.5, 1.0):
        place, along = f"{round(share * length):,}", share * size
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        parts.append(f'<text x="{left + along:.0f}" y="{top + size + 16:.0f}" text-anchor="{anchor}">{place}</text>')
        if share:
            y = top + along + (4 if share < 1 else 0)
            parts.append(f'<text x="{left - 6:.0f}" y="{y:.0f}" text-anchor="end">{place}</text>')
    middle = top + size / 4
    parts.append(f'<text x="{left + size / 2 + 60:.0f}" y="{top + size + 16:.0f}">{across}</text>')
    parts.append(f'<text x="{left - 6:.0f}" y="{middle:.0f}" text-anchor="end">{down}</text>')
    return f'<svg viewBox="0 0 370 336" role="img" aria-label="which {across} each {down} sees">{"".join(parts)}</svg>'


def placement_picture(plan: dict[str, Any], length: int) -> str:
    """Return a picture with a row for each rank: its tokens in the sequence, and its pairs relative to the mean.

    Args:
        plan: the plan of one kind of layer in run.json, with the keys stretches and pairs.
        length: number of tokens of the sequence.
    """
    stretches, pairs = plan["stretches"], plan["pairs"]
    ranks = len(stretches)
    mean = sum(pairs) / ranks or 1.0
    row = 18 if ranks <= 16 else 8
    left, width, right = 34.0, 220.0, 60.0
    height = ranks * row + 44
    parts = []
    most = max(pairs) / mean
    for rank, ranges in enumerate(stretches):
        y = 22 + rank * row
        if row >= 12 or rank % 8 == 0:
            parts.append(f'<text x="{left - 6}" y="{y + row - 5}" text-anchor="end">{rank}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{width}" height="{row - 3}" class="ground"/>')
        for begin, end in ranges:
            x = left + begin / length * width
            parts.append(
                f'<rect x="{x:.2f}" y="{y}" width="{max((end - begin) / length * width, 0.4):.2f}" height="{row - 3}" '
                f'class="fill run0"><title>rank {rank}: tokens {begin:,} to {end:,}</title></rect>'
            )
        share = pairs[rank] / mean
        x = left + width + 16
        parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{share / most * right:.1f}" height="{row - 3}" class="fill run1">'
            f"<title>rank {rank}: {pairs[rank]:,} pairs</title></rect>"
        )
        if row >= 12:
            parts.append(f'<text x="{x + right + 6:.0f}" y="{y + row - 5}">{share:.2f}</text>')
    parts.append(f'<text x="{left}" y="14">tokens of each rank</text>')
    parts.append(f'<text x="{left + width + 16}" y="14">pairs, of the mean</text>')
    foot = height - 6
    parts.append(f'<text x="{left}" y="{foot}">0</text>')
    parts.append(f'<text x="{left + width}" y="{foot}" text-anchor="end">{length:,}</text>')
    label = escape(f"placement over {ranks} ranks")
    return f'<svg viewBox="0 0 400 {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
