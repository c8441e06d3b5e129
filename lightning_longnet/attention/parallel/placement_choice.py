"""The choice of a placement for all layers of a model: a pure function, the same on all ranks."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.parallel.rank_blocks import Layout, RankBlocks

if TYPE_CHECKING:
    from lightning_longnet.attention.parallel.placement import Kind
    from lightning_longnet.attention.pattern.pattern import Pattern

# Zigzag sends more keys of segments and windows, and computes them in smaller blocks: it is chosen where the busiest
# rank would compute more than this many times as many pairs without it
WORTH = 1.25


class LayerAttention(NamedTuple):
    """The attention of a layer, as far as the placement depends on it.

    A strategy gets one for each attention layer of its model (`attention_layers` of huggingface), and the planner makes
    those of the model that it plans.

    Attributes:
        pattern: which keys a query sees.
        heads, kv_heads: the numbers of its heads.
        is_ordered: whether the pattern counts the tokens in their own order, and not along a curve.
    """

    pattern: Pattern
    heads: int
    kv_heads: int
    is_ordered: bool = True

    @property
    def is_dilated(self) -> bool:
        """Whether a branch leaves out keys of its segments; the reason of `placement_choice` counts such layers."""
        return any(branch.dilation_rate > 1 for branch in self.pattern.branches)


class PlacementChoice(NamedTuple):
    """The placement for a model, and why: one batch has one placement, which serves all layers."""

    placement: Kind
    reason: str


@lru_cache(256)
def placement_choice(layers: tuple[tuple[LayerAttention, int], ...], length: int, ranks: int) -> PlacementChoice:
    """Return the placement with which layers are fastest together, and why.

    It is "zigzag" where that makes the busiest rank compute much fewer pairs, as dense causal layers do; else
    "contiguous", which keeps segments and windows on few ranks.  `RunPlacement` asks where the placement of a strategy
    is "auto", `Job` of `longnet plan`, and `choose_placement` for a model of transformers.

    Args:
        layers: the attention of layers, each with the number of layers that have it.
        length: the number of tokens of a sequence, which is counted as one document.
        ranks: the number of ranks that share it.
    """
    if not layers:
        return PlacementChoice("contiguous", "contiguous: no layer has a pattern that is known")
    if not all(layer.is_ordered for layer, _ in layers):
        return PlacementChoice("contiguous", "contiguous: patterns along a curve, whose pairs are not counted")
    zigzag, contiguous = (_busiest(layers, Placement.even(length, ranks, kind)) for kind in ("zigzag", "contiguous"))
    total, dilated = (sum(many for layer, many in layers if layer.is_dilated >= least) for least in (False, True))
    kind: Kind = "zigzag" if contiguous > WORTH * zigzag else "contiguous"
    return PlacementChoice(
        kind,
        f"{kind}: at {length:,} tokens the busiest of {ranks} ranks has {contiguous / max(zigzag, 1):.2f} times the "
        f"pairs under contiguous (limit {WORTH}); {dilated} of {total} layers are dilated",
    )


def _busiest(layers: tuple[tuple[LayerAttention, int], ...], placement: Placement) -> float:
    """Return the (query, key) pairs of the busiest rank of each layer, for one head on average, summed over all layers.

    The maximum is that of each layer, as ranks wait for each other in each.  `placement_choice` compares placements.
    """
    pairs = 0.0
    for layer, many in layers:
        blocks = RankBlocks(Layout(layer.pattern, layer.heads, layer.kv_heads, (0, placement.length), placement))
        pairs += many * max(map(blocks.visible_pairs, range(placement.ranks))) / layer.heads
    return pairs
