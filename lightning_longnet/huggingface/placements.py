"""The placement of sequences for all layers of a model of transformers, of which some may be dilated."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.parallel.sequence_plan import sequence_plan
from lightning_longnet.attention.pattern.pattern import Pattern
from lightning_longnet.huggingface.dilation import FIELD

if TYPE_CHECKING:
    from lightning_longnet.attention.parallel.placement import Kind

# a placement whose busiest rank computes more pairs by less than this share is as good: messages then decide
_AS_GOOD = 0.05


class PlacementChoice(NamedTuple):
    """The placement for a model, and why: one batch has one placement, which serves all layers."""

    placement: Kind
    reason: str


class _Cost(NamedTuple):
    """The pairs of the busiest rank and the most bytes of keys that a rank receives, summed over layers."""

    pairs: int
    received: int


def layer_patterns(model: Any) -> list[Pattern]:
    """Return the pattern of each layer of a causal model: that of `dilate`, or the layer's own window, chunk or all."""
    config = model.config.get_text_config()
    dilated = getattr(config, FIELD, None) or {}
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    default = "sliding_attention" if window else "full_attention"
    kinds = getattr(config, "layer_types", None) or [default] * config.num_hidden_layers
    own = {
        "sliding_attention": Pattern.window(window, is_causal=True) if window else None,
        "chunked_attention": Pattern.dilated((chunk,), (1,), is_causal=True) if chunk else None,
        "full_attention": Pattern.dense(is_causal=True),
    }
    patterns = []
    for number, kind in enumerate(kinds):
        pattern = Pattern(**dilated[str(number)]) if str(number) in dilated else own.get(kind)
        if pattern is None:
            raise ValueError(f"layer {number} is of the kind {kind!r}, which no pattern describes")
        patterns.append(pattern)
    return patterns


def choose_placement(model: Any, length: int, ranks: int) -> PlacementChoice:
    """Return the placement with which all layers of a model together are fastest over some ranks, and why.

    Dense layers are faster with "zigzag", with which ranks compute equally many pairs; dilated ones with "contiguous",
    which keeps their segments on one rank.  The choice minimises the pairs of the busiest rank.  If these are about
    equal, it minimises the bytes that ranks receive.
    """
    config = model.config.get_text_config()
    counts = Counter(layer_patterns(model))
    zigzag, contiguous = (_cost(counts, config, length, ranks, kind) for kind in ("zigzag", "contiguous"))
    layers = f"of {sum(counts.values())} layers, {sum(n for p, n in counts.items() if _is_dilated(p))} are dilated"
    numbers = (
        f"the busiest rank computes {zigzag.pairs:.3g} pairs a head under zigzag and {contiguous.pairs:.3g} under "
        f"contiguous, and receives {zigzag.received / 2**20:,.1f} and {contiguous.received / 2**20:,.1f} MiB of keys"
    )
    if max(zigzag.pairs, contiguous.pairs) > (1 + _AS_GOOD) * min(zigzag.pairs, contiguous.pairs):
        kind: Kind = "zigzag" if zigzag.pairs < contiguous.pairs else "contiguous"
        return PlacementChoice(kind, f"{kind}: {layers}; {numbers}: the pairs decide")
    kind = "zigzag" if zigzag.received < contiguous.received else "contiguous"
    return PlacementChoice(kind, f"{kind}: {layers}; {numbers}: the pairs are about equal, and the bytes decide")


def _cost(counts: Counter[Pattern], config: Any, length: int, ranks: int, kind: Kind) -> _Cost:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    pairs = received = 0
    for pattern, layers in counts.items():
        plan = sequence_plan(pattern, Placement.even(length, ranks, kind).lengths, heads, kv_heads, placement=kind)
        pairs += layers * max(plan.pairs)
        received += layers * max(map(sum, plan.received))
    return _Cost(pairs // heads, received)


def _is_dilated(pattern: Pattern) -> bool:
    return any(branch.dilation_rate > 1 for branch in pattern.branches)
