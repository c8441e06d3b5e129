"""The plan before the launch: its figures are those of the run, and it can be read and drawn."""

import pytest
import torch

from lightning_longnet import Branch, Pattern, sequence_plan
from lightning_longnet.attention.plan.blocks import plan

LONGNET = Pattern.dilated((64, 256, 1024), (1, 2, 4), is_causal=True)


@pytest.mark.parametrize("exchange", ["gather", "ring", "swap", "auto"])
@pytest.mark.parametrize("placement", ["contiguous", "zigzag"])
def test_all_ranks_together_compute_every_pair_once(exchange, placement):
    result = sequence_plan(LONGNET, (300, 100, 400, 224), 8, 4, placement=placement, exchange=exchange)
    assert sum(result.pairs) == plan(LONGNET, 8, 4, (0, 1024)).pairs
    if exchange == "swap":
        assert all(v.kept_bytes > 0 for v in result.volumes)
        lengths = result.layout.placement.lengths  # each rank gets one of four key heads, 64 wide, in float32
        assert result.received == tuple(
            tuple(0 if a == b else lengths[b] * 2 * 64 * 4 for b in range(4)) for a in range(4)
        )
    else:
        kept = [sum(row) for row in result.received]
        assert sum(kept) > 0
        if exchange == "gather":
            assert [v.kept_bytes for v in result.volumes] == kept


def test_zigzag_balances_a_dense_causal_pattern():
    dense = Pattern.dense(True)
    even = sequence_plan(dense, (128,) * 4, 4, placement="zigzag", exchange="ring")
    assert len(set(even.pairs)) == 1
    uneven = sequence_plan(dense, (128,) * 4, 4, exchange="ring")
    assert max(uneven.pairs) > 1.7 * sum(uneven.pairs) / 4
    assert "the busiest rank has 1.00 times the mean of the pairs" in str(even)


def test_is_drawn(tmp_path):
    for exchange in ("gather", "swap"):
        figure = sequence_plan(LONGNET, (256,) * 4, 8, 4, exchange=exchange).plot()
        figure.savefig(tmp_path / "plan.png")
        assert (tmp_path / "plan.png").stat().st_size > 5000
    local = sequence_plan(Pattern.dilated((64,), (1,)), (256,) * 2, 2).plot()
    assert local.axes[0].get_title() == "nothing travels"
    with pytest.raises(ValueError, match="at most 256 ranks can be drawn, got 300: print it"):
        sequence_plan(Pattern.window(4), (4,) * 300, 2).plot()


def test_half_types_move_half_the_bytes():
    options = {"lengths": (256,) * 4, "heads": 8, "exchange": "gather"}
    full, half = (sequence_plan(LONGNET, **options, dtype=t) for t in (torch.float32, torch.bfloat16))
    assert [[2 * b for b in row] for row in half.received] == [list(row) for row in full.received]


def test_documents_that_do_not_add_up():
    with pytest.raises(ValueError, match="documents must have the 1024 tokens of all ranks together, got 1000"):
        sequence_plan(LONGNET, (256,) * 4, 8, documents=(500, 500))
    apart = sequence_plan(LONGNET, (256,) * 4, 8, documents=(256,) * 4)
    assert apart.schedule.why == "nothing has to travel"


@pytest.mark.parametrize("exchange", ["gather", "swap"])
def test_pairs_are_counted_as_the_pattern_does(exchange):
    """Where branches do not nest, blocks of negative weight take away what two of them show."""
    pattern = Pattern((Branch(6, 2), Branch(9, 3), Branch(window=5)), "set")
    result = sequence_plan(pattern, (10, 14), 4, exchange=exchange)
    assert any(block.weight < 0 for blocks in plan(pattern, 4, 4, (0, 24)).branches for block in blocks)
    assert sum(result.pairs) == int(pattern.mask(24, 4).sum())
    assert "a pair counts" not in str(result)
    assert "a pair counts as often as branches show it" in str(sequence_plan(LONGNET, (10, 14), 4))


def test_nothing_is_planned_for_nothing():
    assert sequence_plan(LONGNET, (0, 0), 4).pairs == (0, 0)
