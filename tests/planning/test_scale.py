"""The formulas of the simulation beside plans that enumerate every rank."""

from itertools import pairwise

import pytest
import torch

from lightning_longnet.attention.parallel.sequence_plan import sequence_plan
from lightning_longnet.planning import scale
from lightning_longnet.planning.devices import named


@pytest.mark.parametrize(("tokens", "ranks"), [(32_768, 1), (65_536, 2), (262_144, 4), (262_144, 32), (524_288, 16)])
def test_formulas_are_the_plans_of_the_last_rank(tokens, ranks):
    here = tokens // ranks
    cost = scale.dilated(tokens, here)
    plan = sequence_plan(
        scale.pattern(tokens), (here,) * ranks, scale.HEADS, exchange="gather", head_dim=64, dtype=torch.bfloat16
    )
    wide = 1 + scale.WIDE_ITEMSIZE // scale.ITEMSIZE
    assert cost.moved_bytes == wide * sum(plan.received[-1])
    assert cost.pairs == pytest.approx(plan.pairs[-1], rel=0.02)  # heads begin at rows of their own
    assert cost.messages == 2 * sum(each > 0 for each in plan.received[-1])


def test_dense_is_every_pair_once():
    cost = scale.dense(4096, 1024)
    assert 4 * cost.pairs == scale.HEADS * 4096 * 4097 // 2
    assert cost.messages == 9


def test_dilated_time_is_flat_while_messages_are_few():
    rows = scale.simulate(named("h200"))
    assert rows[-1].tokens == 2**30
    assert rows[-1].devices == 16_384
    flat = [row.dilated_seconds for row in rows if 2**16 <= row.tokens <= 2**21]
    assert max(flat) < 1.1 * min(flat)
    dense = [row.dense_seconds for row in rows if row.tokens >= 2**16]
    assert all(1.9 < later / sooner < 2.1 for sooner, later in pairwise(dense))
    assert scale.table(rows).count("\n") == len(rows) + 1
