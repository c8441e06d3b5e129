"""A block's mask as flash attention's operators take it: windows aligned to the bottom right corner."""

from __future__ import annotations

from typing import NamedTuple


class Window(NamedTuple):
    """One call of flash attention: a slice of the queries and of the keys of a block, and how far each query sees.

    Aligned to the bottom right, query a of n is level with key `a + m - n` of m.  It sees at most `left` keys
    before its level and `right` keys after it; -1 is no bound.
    """

    queries: slice
    keys: slice
    left: int
    right: int


def windows(queries: int, keys: int, low: int | None, high: int | None) -> tuple[Window, ...]:
    """Return windows that hold each pair of a block once: query a sees key b iff `low <= a - b <= high`.

    A query in no window sees no key.  Nearly all blocks of a plan are one window.  The queries on which `low` has no
    effect get a separate window, since the operators replace bounds: they take `right >= keys` for no bound, which is
    wrong where there are more queries than keys; and they take `right = -1` beside a finite `left` for `right = keys`.
    `_windows` of fused.py calls it for each block of a kernel of flash attention.

        low = 0                  low = -1, high = 1
        x . .                    x x . .     one window: left 2, right 0, with the last query level with the last key
        x x .                    x x x .
        x x x                    . x x x
        x x x  <- second window  . . x x     <- second window: left 1, right -1
    """
    first = 0 if low is None else max(0, low)
    last = queries if high is None else min(queries, keys + high)
    bound = first if low is None else min(last, keys + low)  # `low` has no effect from this query on
    whole = last if high is None else min(last, max(bound, high + 1))  # `high` has no effect before this query
    parts = []
    if first < bound:  # queries under `low`: a key before the diagonal is their last
        assert low is not None, "rows are bound by low"
        begin = 0 if high is None else max(0, first - high)
        left = -1 if high is None or high - low >= bound - low - begin - 1 else high - low
        parts.append(Window(slice(first, bound), slice(begin, bound - low), left, 0))
    start = max(first, bound)
    if start < whole:  # queries that see every key
        parts.append(Window(slice(start, whole), slice(0, keys), -1, -1))
    start = max(start, whole)
    if start < last:  # queries under `high` alone
        assert high is not None, "rows are bound by high"
        left = keys - last + high
        parts.append(Window(slice(start, last), slice(start - high, keys), left, -1))
    return tuple(parts)
