"""Which parameters decay, and what the schedule's rates are."""

import math

import pytest
import torch
from torch import nn

from lightning_longnet import MultiheadDilatedAttention, Pattern
from lightning_longnet.models.longnet import LongNet, LongNetConfig
from lightning_longnet.training.optimization import decay_groups, warmup_cosine

PATTERN = Pattern.dilated((8, 16), (1, 2), is_causal=True)


def test_weights_decay_and_biases_norms_and_bare_parameters_do_not():
    model = LongNet(LongNetConfig(PATTERN, vocab_size=11, dim=8, layers=1, heads=2, qk_norm=True))
    model.register_parameter("table", nn.Parameter(torch.zeros(3, 8)))
    model.blocks[0].attention.out_proj.weight.requires_grad_(False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decaying, others = decay_groups(model, 0.3)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    block = "blocks.0"
    assert [names[each] for each in decaying["params"]] == [
        "embedding.weight",  # the head's, too, once
        f"{block}.attention.qkv_proj.weight",
        f"{block}.feed_forward.first.weight",
        f"{block}.feed_forward.second.weight",
    ]
    rest = {names[each] for each in others["params"]}
    assert rest == set(names.values()) - {names[each] for each in decaying["params"]} - {
        f"{block}.attention.out_proj.weight"
    }
    assert {"table", "norm.weight", f"{block}.attention.q_norm.weight", f"{block}.attention.qkv_proj.bias"} <= rest


def test_weights_of_other_names_and_convolutions_decay():
    module = nn.ModuleList(
        [MultiheadDilatedAttention(8, 2, pattern=PATTERN), nn.Conv2d(1, 2, 3), nn.BatchNorm1d(4), nn.GroupNorm(1, 4)]
    )
    decaying, others = decay_groups(module, 0.1)
    assert {tuple(each.shape) for each in decaying["params"]} == {(24, 8), (8, 8), (2, 1, 3, 3)}
    assert all(each.dim() == 1 for each in others["params"])
    assert len(decay_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1


def rates(steps, *options):
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]}], lr=2.0)
    schedule, result = warmup_cosine(optimizer, steps, *options), []
    for _ in range(steps + 2):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return result


def test_rates_rise_in_a_line_and_fall_as_a_cosine():
    result = rates(13, 4, 0.2)
    assert result[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    expected = [2 * (0.2 + 0.8 * (1 + math.cos(math.pi * i / 9)) / 2) for i in range(1, 10)]
    assert result[4:13] == pytest.approx(expected)
    assert result[12:] == pytest.approx([0.4] * 3)
    assert rates(5, 0, 0.0)[:5] == pytest.approx([1 + math.cos(math.pi * i / 4) for i in range(5)])
    assert rates(1, 0)[0] == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0, 0), "steps must be a positive integer, got 0"),
        ((5, 5), "warmup_steps must be from 0 to 4, fewer than steps, got 5"),
        ((5, 1, 1.5), "final_share must be from 0 to 1, got 1.5"),
    ],
)
def test_schedules_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rates(*options)
    with pytest.raises(ValueError, match="weight_decay must be a number, at least 0, got -1"):
        decay_groups(nn.Linear(1, 1), -1)
