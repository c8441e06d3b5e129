"""Steps that are not finite: skipped without a trace, or an error on all ranks, whatever the engine."""

import pytest
from guarded import guard
from test_training import MESHES
from tiers import tiered
from trained import adamw, sgd


def workers_of(sharding, trainers, deepspeed_trainers, world):
    return deepspeed_trainers(world) if sharding.startswith("deepspeed") else trainers


@pytest.mark.parametrize(
    ("sharding", "what"),
    tiered(
        [
            ("ddp", "loss"),
            ("ddp", "gradient"),
            ("fsdp2", "loss"),
            ("fsdp2", "gradient"),
            ("fsdp2_offload", "gradient"),
            ("hsdp", "loss"),
            ("deepspeed_stage_1", "loss"),
            ("deepspeed_stage_1", "gradient"),
            ("deepspeed_stage_2", "loss"),
            ("deepspeed_stage_2", "gradient"),
            ("deepspeed_stage_3", "loss"),
            ("deepspeed_stage_3", "gradient"),
            ("deepspeed_stage_3_offload", "gradient"),
        ],
        quick=[("ddp", "loss"), ("fsdp2", "gradient")],
        long=[("deepspeed_stage_3_offload", "gradient")],
    ),
)
def test_a_skipped_step_leaves_everything_as_it_was(trainers, deepspeed_trainers, sharding, what):
    workers = workers_of(sharding, trainers, deepspeed_trainers, 2)
    for rank, result in enumerate(workers.run(2, guard, 2, sharding, adamw, what)):
        same, skipped, logged, is_finite, messages = result
        assert same == [False, False, True, True, False, False]
        assert skipped == logged == 2
        assert is_finite
        if rank == 0:
            assert len(messages) == 2
            assert "batch 2 of each group" in messages[0]
            assert ("the loss is not finite on rank 1" if what == "loss" else "the gradient is not finite") in messages[
                0
            ]


@pytest.mark.parametrize("mesh", tiered(["1x1", "2x1", "2x2"], quick=[], full=["1x1", "2x1"]))
def test_other_meshes_and_momentum(trainers, mesh):
    world, size = MESHES[mesh]
    for same, skipped, *_ in trainers.run(world, guard, size, "fsdp2", sgd, "loss"):
        assert same == [False, False, True, True, False, False]
        assert skipped == 2


def test_a_batch_of_an_accumulated_step_spoils_it(trainers):
    messages = []
    for same, skipped, *_, lines in trainers.run(2, guard, 2, "ddp", sgd, "loss", "skip", 10, (2,), 2):
        # batches 2 and 3 are one step; a micro-batch that is accumulated changes nothing
        assert same == [True, False, True, True, True, False]
        assert skipped == 1
        messages += lines
    assert "batch 2, 3 of each group" in messages[0]


@pytest.mark.parametrize("sharding", tiered(["ddp", "fsdp2", "deepspeed_stage_2"], quick=["fsdp2"], full=["ddp"]))
def test_raising_is_on_all_ranks(trainers, deepspeed_trainers, sharding):
    workers = workers_of(sharding, trainers, deepspeed_trainers, 2)
    for is_result, (kind, message, _) in workers.outcomes(2, guard, 2, sharding, sgd, "gradient", "raise"):
        assert not is_result
        assert kind is FloatingPointError
        assert "the gradient is not finite" in message


def test_patience_ends(trainers):
    for is_result, (kind, message, _) in trainers.outcomes(2, guard, 1, "ddp", sgd, "loss", "skip", 2):
        assert not is_result
        assert kind is FloatingPointError
        assert message.startswith("2 steps in a row were skipped")
        assert "group 0 held" in message
        assert "group 1 held" in message
