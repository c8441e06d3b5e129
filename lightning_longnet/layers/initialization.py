"""How weights begin: xavier, and the gain of MAGNETO (Foundation Transformers, arXiv 2210.06423)."""

from __future__ import annotations

from math import log, sqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_longnet.layers.options import positive_integer

if TYPE_CHECKING:
    from collections.abc import Sequence


def magneto_gain(layers: int) -> float:
    """The `gain` of a model of so many layers: sqrt(log(2 layers)), for encoders alone and decoders alone.

    It belongs to `sub_norm=True`; v, the output projection and the feed-forward are scaled by it, q and k are not.

    >>> round(magneto_gain(12), 4)
    1.7827
    """
    return sqrt(log(2 * positive_integer("layers", layers)))


@torch.no_grad()
def xavier_parts(weight: Tensor, rows: Sequence[int], gains: Sequence[float]) -> None:
    """Fill a fused weight part by part: each projection has the variance of its own fan-out, not of their sum."""
    for part, gain in zip(weight.split(list(rows)), gains, strict=True):
        nn.init.xavier_normal_(part, gain)
