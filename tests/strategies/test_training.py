"""Training over any mesh and engine equals a plain loop in one process on the same global batches."""

from functools import cache
from itertools import product

import pytest
import torch
from tiers import tiered
from trained import adamw, fit, reference, samples, sgd

MESHES = {"1x1": (1, 1), "1x2": (2, 2), "2x1": (2, 1), "2x2": (4, 2), "1x4": (4, 4)}
COMBINED = {
    "dropout": 0.2,
    "samples": samples(16),
    "global_batch": 4,
    "accumulate": 2,
    "micro_batches": 4,
    "clip": 0.5,
    "seed": 5,
}
FLOAT64 = {**COMBINED, "dtype": torch.float64, "optimizer": adamw}
FLOAT32 = {**COMBINED, "dtype": torch.float32, "optimizer": sgd}
DOCUMENTS = {**FLOAT64, "samples": samples(16, documents=True)}


@cache
def expected(name):
    return reference({"float64": FLOAT64, "float32": FLOAT32, "documents": DOCUMENTS}[name])


def compare(result, reference, tolerance):
    (losses, parameters), (right, best) = result, reference
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(right), rtol=tolerance, atol=tolerance)
    assert set(parameters) == set(best)
    for name, x in parameters.items():
        torch.testing.assert_close(x, best[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


QUICK = [("ddp", "1x2"), ("ddp", "2x1"), ("fsdp2", "1x2"), ("hsdp", "2x2")]


@pytest.mark.parametrize(
    ("sharding", "mesh"), tiered(product(["ddp", "fsdp2", "hsdp"], MESHES), quick=QUICK, long=[("fsdp2", "1x4")])
)
def test_float64_equals_one_process(trainers, sharding, mesh):
    world, size = MESHES[mesh]
    for result in trainers.run(world, fit, FLOAT64, sharding, size):
        compare(result, expected("float64"), 1e-9)


@pytest.mark.parametrize(("stage", "mesh"), tiered(product([1, 2, 3], MESHES), quick=[(3, "1x2")], long=[]))
def test_float32_of_deepspeed_equals_one_process(deepspeed_trainers, stage, mesh):
    world, size = MESHES[mesh]
    for result in deepspeed_trainers(world).run(world, fit, FLOAT32, f"deepspeed_stage_{stage}", size):
        compare(result, expected("float32"), 1e-5)


@pytest.mark.parametrize("sharding", tiered(["fsdp2_offload", "deepspeed_stage_3_offload"], quick=["fsdp2_offload"]))
def test_offloading_changes_nothing(trainers, deepspeed_trainers, sharding):
    workers = trainers if sharding == "fsdp2_offload" else deepspeed_trainers(2)
    for result in workers.run(2, fit, FLOAT32, sharding, 2):
        compare(result, expected("float32"), 1e-5)
