"""Initialisation of weights: Xavier, and the gain of MAGNETO (Foundation Transformers, arXiv 2210.06423)."""

from __future__ import annotations

from math import log, sqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_longnet.layers.options import positive_integer

if TYPE_CHECKING:
    from collections.abc import Sequence


def magneto_gain(layers: int) -> float:
    """Return sqrt(log(2 * layers)), the gain for an encoder-only or decoder-only model of this many layers.

    Use it together with `sub_norm=True`.  It scales v, the output projection and the feed-forward, not q and k.

    >>> round(magneto_gain(12), 4)
    1.7827
    """
    return sqrt(log(2 * positive_integer("layers", layers)))


@torch.no_grad()
def xavier_parts(weight: Tensor, rows: Sequence[int], gains: Sequence[float]) -> None:
    """Fill a fused weight in place, one projection at a time.

    Each projection gets the variance of its fan-out.  Filling the weight at once would take the sum of their
    fan-outs, and start all of them too small.

    Args:
        weight: (sum of `rows`, fan-in).
        rows: number of rows of each projection.
        gains: gain of each projection.
    """
    for part, gain in zip(weight.split(list(rows)), gains, strict=True):
        nn.init.xavier_normal_(part, gain)
