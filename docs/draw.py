"""Draw the pictures of the pages: `python docs/draw.py` writes docs/pictures/*."""

from __future__ import annotations

from pathlib import Path

from lightning_longnet import Pattern

FOLDER = Path(__file__).parent / "pictures"
INK, QUIET, PAPER, GRID = "#1f2328", "#6b7280", "#fbfaf7", "#e4e0d8"
OWN, SHADES = "#c9d8ee", ["#f2b872", "#d9683c", "#93295a"]
BRANCHES = ((8, 1), (16, 2), (32, 4))
TOKENS, RANKS, HEADS = 32, 4, 4


def svg(width: int, height: int, label: str, parts: list[str]) -> str:
    """Return a picture on paper of its own, so that it can be read on light and on dark pages."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{label}" '
        'font-family="system-ui, sans-serif" font-size="13">'
    )
    paper = f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>'
    return "\n".join([head, paper, *parts, "</svg>\n"])


def text(x: float, y: float, words: str, anchor: str = "start", colour: str = INK, size: int = 13) -> str:
    """Return a line of text."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}" font-size="{size}">{words}</text>'


def square(x: float, y: float, side: float, colour: str) -> str:
    """Return a filled square with a small gap around it."""
    return f'<rect x="{x:g}" y="{y:g}" width="{side - 1:g}" height="{side - 1:g}" fill="{colour}"/>'


def keys() -> str:
    """Return the keys of each query: one panel for each branch, and one for all of them."""
    side, top, parts = 6, 44, []
    patterns = [Pattern.dilated((w,), (r,), is_causal=True) for w, r in BRANCHES]
    titles = [f"segment {w}, rate {r}" for w, r in BRANCHES]
    patterns.append(Pattern.dilated(*zip(*BRANCHES, strict=True), is_causal=True))
    for panel, (pattern, title) in enumerate(zip(patterns, [*titles, "all three"], strict=True)):
        left = 34 + panel * (TOKENS * side + 24)
        parts.append(text(left, 28, title))
        parts.append(f'<rect x="{left}" y="{top}" width="{TOKENS * side}" height="{TOKENS * side}" fill="{GRID}"/>')
        counts = pattern.mask(TOKENS, HEADS)[0]
        for query, key in counts.nonzero().tolist():
            parts.append(square(left + key * side, top + query * side, side, SHADES[counts[query, key] - 1]))
        parts.append(text(left + TOKENS * side / 2, top + TOKENS * side + 18, "key", "middle", QUIET))
    parts.append(
        f'<text transform="translate(22 {top + TOKENS * side / 2:g}) rotate(-90)" text-anchor="middle" fill="{QUIET}">'
        "query</text>"
    )
    x, y = 34, top + TOKENS * side + 36
    for count, words in enumerate(("counted once", "twice", "three times")):
        parts += [square(x, y, 12, SHADES[count]), text(x + 18, y + 11, words, colour=QUIET)]
        x += 30 + 8 * len(words)
    return svg(906, 302, "the keys that each query sees in three branches and in all of them", parts)


def _received(pattern: Pattern, rank: int) -> list[int]:
    """Return the keys of other ranks that the queries of a rank see, in head 0."""
    local = TOKENS // RANKS
    seen = pattern.mask(TOKENS, HEADS)[0, rank * local : (rank + 1) * local].any(0).tolist()
    return [key for key in range(TOKENS) if seen[key] and key // local != rank]


def traffic() -> str:
    """Return the keys that each of four ranks receives, of a dilated pattern and of a dense one."""
    side, parts, local = 12, [], TOKENS // RANKS
    panels = [
        (
            "dilated: segments 8, 16, 32 with rates 1, 2, 4",
            Pattern.dilated(*zip(*BRANCHES, strict=True), is_causal=True),
        ),
        ("dense", Pattern.dense(is_causal=True)),
    ]
    for panel, (title, pattern) in enumerate(panels):
        left, top = 70 + panel * (TOKENS * side + 60), 46
        parts.append(text(left, 28, title))
        for rank in range(RANKS):
            y, received = top + rank * 26, _received(pattern, rank)
            if not panel:
                parts.append(text(left - 10, y + 11, f"rank {rank}", "end", QUIET))
            for key in range(TOKENS):
                colour = OWN if key // local == rank else SHADES[1] if key in received else GRID
                parts.append(square(left + key * side, y, side, colour))
            parts.append(text(left + TOKENS * side + 8, y + 11, str(len(received)), colour=QUIET))
        for begin in range(0, TOKENS, local):
            x = left + (begin + local / 2) * side
            parts.append(text(x, top + RANKS * 26 + 12, f"tokens {begin}-{begin + local - 1}", "middle", QUIET, 11))
    x, y = 70, 180
    for colour, words in (
        (OWN, "own tokens"),
        (SHADES[1], "keys that are received"),
        (GRID, "keys that do not travel"),
    ):
        parts += [square(x, y, 13, colour), text(x + 20, y + 11, words, colour=QUIET)]
        x += 190
    return svg(944, 208, "the keys that each rank receives from the other ranks", parts)


def _box(x: float, y: float, width: float, words: str, colour: str) -> list[str]:
    """Return a box with a line of text in its middle."""
    box = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="34" rx="5" fill="{colour}" stroke="{INK}"/>'
    return [box, text(x + width / 2, y + 22, words, "middle")]


def _arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    """Return a line that ends in a dot."""
    line = f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{QUIET}" stroke-width="1.5"/>'
    return line + f'<circle cx="{to_x:g}" cy="{to_y:g}" r="3" fill="{QUIET}"/>'


def gradient() -> str:
    """Return the blocks of a query in the forward and in the backward."""
    parts = [text(30, 30, "forward"), text(560, 30, "backward")]
    for row, words in enumerate(("own keys, branch 1", "own keys, branch 2", "received keys, branch 2")):
        y, number = 48 + row * 56, "₁₂₃"[row]
        parts += [*_box(30, y, 260, f"{words}: out{number}, lse{number}", OWN), _arrow(290, y + 17, 352, 121)]
        parts += [*_box(770, y, 170, words, OWN), _arrow(704, 121, 766, y + 17)]
        parts += [text(950, y + 22, f"dq{number}, dk{number}, dv{number}", colour=QUIET)]
    parts += [*_box(356, 104, 100, "out, lse", SHADES[0]), text(406, 158, "one softmax", "middle", QUIET)]
    parts += [*_box(560, 104, 144, "out, lse, d out", SHADES[0]), _arrow(456, 121, 556, 121)]
    parts += [text(632, 158, "the same for each block", "middle", QUIET)]
    label = "each block gives out and lse, which are merged; the backward of each block takes the merged ones"
    return svg(1056, 224, label, parts)


PICTURES = {"keys": keys, "traffic": traffic, "gradient": gradient}


def main() -> None:
    """Write all pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw())
    pattern = Pattern.dilated(*zip(*BRANCHES, strict=True), is_causal=True)
    pattern.plot(TOKENS, HEADS).savefig(FOLDER / "heads.png", dpi=90)


if __name__ == "__main__":
    main()
