"""The choice of a placement by the layers of a model: which it is, why, and that its counts are those of the plan."""

import pytest

from lightning_longnet import Pattern, sequence_plan
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.parallel.placement_choice import LayerAttention, placement_choice
from lightning_longnet.attention.parallel.rank_blocks import Layout, RankBlocks

DENSE = Pattern.dense(is_causal=True)
DILATED = Pattern.dilated((64, 256, 1024), (1, 2, 4), is_causal=True)
PATTERNS = [
    DENSE,
    DILATED,
    Pattern.dense(),
    Pattern.dilated((7, 33), (1, 3)),
    Pattern.dilated((7, 33), (1, 3), is_causal=True, multiplicity="set"),
    Pattern.window(9, is_causal=True),
    Pattern.window(9) + Pattern.dilated((32,), (4,)),
]


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("length", "ranks"), [(101, 2), (128, 4), (37, 5)])
def test_the_pairs_of_a_rank_are_those_of_the_plan(pattern, kind, length, ranks):
    placement = Placement.even(length, ranks, kind)
    blocks = RankBlocks(Layout(pattern, 4, 2, (0, length), placement))
    expected = sequence_plan(pattern, placement.lengths, 4, 2, placement=kind).pairs
    assert tuple(map(blocks.visible_pairs, range(ranks))) == expected


@pytest.mark.parametrize(
    ("layers", "length", "ranks", "expected"),
    [
        ({DENSE: 4}, 4096, 2, "zigzag"),
        ({DILATED: 4}, 4096, 2, "contiguous"),
        ({DENSE: 1, DILATED: 3}, 4096, 2, "zigzag"),  # one dense layer computes most of the pairs
        ({DENSE: 1, DILATED: 99}, 4096, 2, "contiguous"),  # and does not among so many
        ({Pattern.window(64, is_causal=True): 2}, 4096, 4, "contiguous"),
        ({Pattern.dense(): 2}, 4096, 4, "contiguous"),  # ranks compute equally many pairs anyway
        ({DILATED: 4}, 256, 8, "zigzag"),  # segments of the sequence are dense attention for most of their pairs
        ({}, 4096, 2, "contiguous"),
    ],
)
def test_the_choice_is_by_the_pairs_of_the_busiest_rank(layers, length, ranks, expected):
    counted = tuple((LayerAttention(pattern, 4, 2), many) for pattern, many in layers.items())
    choice = placement_choice(counted, length, ranks)
    assert choice.placement == expected
    assert choice.reason.startswith(f"{expected}: ")


def test_the_reason_has_the_numbers():
    layers = ((LayerAttention(DENSE, 4, 4), 3), (LayerAttention(DILATED, 4, 4), 1))
    pairs = {
        kind: sum(
            many * max(sequence_plan(layer.pattern, (2048,) * 2, 4, 4, placement=kind).pairs) / 4
            for layer, many in layers
        )
        for kind in ("zigzag", "contiguous")
    }
    reason = placement_choice(layers, 4096, 2).reason
    ratio = pairs["contiguous"] / pairs["zigzag"]
    assert reason == (
        f"zigzag: at 4,096 tokens the busiest of 2 ranks has {ratio:.2f} times the pairs under contiguous (limit "
        f"1.25); 1 of 4 layers are dilated"
    )


def test_patterns_along_a_curve_are_not_counted():
    layers = ((LayerAttention(DENSE, 4, 4, is_ordered=False), 3),)
    assert placement_choice(layers, 4096, 2).placement == "contiguous"
