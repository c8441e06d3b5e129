"""The nearest of the right names to one that is misspelt."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def nearest(name: str, names: Iterable[str], likeness: float = 0.6, mark: str = ";") -> str:
    """Return the question whether the nearest of `names` was meant, or an empty text where none is near.

    `mark` stands between the text before and the question.
    """
    near = get_close_matches(name, [*names], 1, likeness)
    return f"{mark} did you mean {near[0]}?" if near else ""
