"""What a plan says that a run sends, to the byte, beside what the run hands to the network."""

import pytest
from planned import config_of, train
from tiers import tiered

from lightning_longnet.planning.exchange import layer_kinds, sent_bytes
from lightning_longnet.planning.job import Job

CASES = [
    (2, 2, "gather", 97, {}, 2, 1),
    (2, 2, "auto", 96, {"recompute": "all but attention"}, 1, 2),
    (2, 2, "swap", 96, {"recompute": "everything"}, 1, 1),
    (4, 2, "gather", 100, {"recompute": "everything"}, 1, 1),
    (4, 4, "ring", 130, {}, 1, 1),
    (4, 4, "ring", 131, {"recompute": "everything"}, 2, 2),
]


@pytest.mark.parametrize(
    ("world", "shared", "exchange", "tokens", "model", "accumulate", "batch"),
    tiered(CASES, quick=[CASES[4]], long=[CASES[2]]),
)
def test_bytes_of_a_run(trainers, world, shared, exchange, tokens, model, accumulate, batch):
    job = Job(
        config_of(model),
        tokens,
        batch=batch,
        per_node=world,
        sequence_parallel_size=shared,
        exchange=exchange,
        sharding="ddp",
        accumulate=accumulate,
    )
    kinds = layer_kinds(job)
    counted = trainers.run(world, train, shared, exchange, tokens, model, accumulate, batch)
    assert sum(map(sum, counted)) > 0
    for rank, steps in enumerate(counted):
        planned = sent_bytes(job, kinds, rank % shared)
        assert steps == [planned, planned], f"rank {rank}"
        for kind in kinds:
            share = kind.shares[rank % shared]
            assert sum(share.branch_bytes) == (0 if exchange == "swap" else share.volume.sent_bytes)
