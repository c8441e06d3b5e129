"""A run that cannot fit into the memory of one rank ends on all of them before the first step."""

import warnings

import pytest
import torch
from torch.utils.data import DataLoader
from trained import Module, quiet, sgd, started, trainer_of

from lightning_longnet import LongNetConfig, LongNetModule, Pattern
from lightning_longnet.planning.room import Room
from lightning_longnet.strategies import RingSequenceParallelStrategy, memory

PATTERN = Pattern.dilated((8, 64), (1, 2), is_causal=True)


def fit(rank, world, sharding, rooms, action, ours=True):
    """(the error, the warnings, the steps taken) of a run whose ranks have these rooms."""
    real, memory.room_of = memory.room_of, lambda *_: Room(*rooms[rank])
    config = LongNetConfig(PATTERN, vocab_size=64, dim=16, layers=1, heads=2)
    module = LongNetModule(config) if ours else Module(started({"dropout": 0.0, "dtype": torch.float32}), sgd)
    tokens = torch.zeros(1, 32, dtype=torch.long)
    batch = {"input_ids": tokens, "labels": tokens, "attention_mask": tokens + 1}
    try:
        with quiet(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            strategy = RingSequenceParallelStrategy(sharding=sharding, memory_check=action, split_check="off")
            trainer = trainer_of(strategy, world, max_steps=1)
            error = ""
            try:
                trainer.fit(module, DataLoader([batch], batch_size=None))
            except ValueError as raised:
                error = str(raised)
    finally:
        memory.room_of = real
    warned = [str(each.message) for each in caught if "longnet plan" in str(each.message)]
    return error, warned, trainer.global_step


PLENTY, NOTHING, FULL = (1e12, 1e12), (10.0, 10.0), (10.0, 1e12)


@pytest.mark.parametrize("sharding", ["ddp", pytest.param("fsdp2", marks=pytest.mark.long)])
def test_too_little_memory_on_one_rank_ends_all_before_the_first_step(trainers, sharding):
    (first, *_), (second, *_) = result = trainers.run(2, fit, sharding, [PLENTY, NOTHING], "error")
    assert "rank 1 has too little memory" in first
    assert "a step of 32 tokens holds at least 0.0 GiB on a rank by longnet plan" in second
    assert [steps for *_, steps in result] == [0, 0]


@pytest.mark.long
def test_a_warning_goes_on(trainers):
    for rooms, action in (([PLENTY, NOTHING], "warn"), ([PLENTY, FULL], "error")):
        result = trainers.run(2, fit, "ddp", rooms, action)
        assert [error for error, *_ in result] == ["", ""]
        assert [len(warned) for _, warned, _ in result] == [0, 1]
        assert [steps for *_, steps in result] == [1, 1]


def test_nothing_is_said_where_all_is_well_or_off(trainers):
    for rooms, action in (([PLENTY, PLENTY], "error"), ([NOTHING, NOTHING], "off")):
        assert trainers.run(2, fit, "ddp", rooms, action) == [("", [], 1)] * 2


def test_of_other_modules_the_parameters_count(trainers):
    result = trainers.run(2, fit, "ddp", [NOTHING, FULL], "error", False)
    assert "parameters, gradients and the optimizer's states hold at least" in result[0][0]
    assert "rank 0 has too little memory" in result[1][0]
    assert trainers.run(2, fit, "ddp", [FULL, FULL], "error", False) == [("", [], 1)] * 2


def test_a_wrong_action_is_refused():
    with pytest.raises(ValueError, match="memory_check must be one of 'error', 'warn', 'off', got 'maybe'"):
        RingSequenceParallelStrategy(sharding="ddp", memory_check="maybe")
