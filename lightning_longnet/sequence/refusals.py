"""Errors by which this package refuses the parts of sequences that a step gives it, where others must know them."""

from __future__ import annotations


class LocalPositionsError(ValueError):
    """Positions begin at 0 on a rank whose tokens are not the first: they are counted there, or a document begins."""
