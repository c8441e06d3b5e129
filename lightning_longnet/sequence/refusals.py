"""Errors by which this package refuses the parts of sequences that a step gives it, where others must know them."""

from __future__ import annotations


class LocalPositionsError(ValueError):
    """An error for positions that begin at 0 on a rank whose tokens are not the first of the sequence.

    "ring" attention of transformers' models raises it if such a rank seems to have counted its own tokens from 0.  The
    split check takes it for a wrong split.
    """
