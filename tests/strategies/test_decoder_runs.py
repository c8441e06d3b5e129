"""A model of transformers, trained over any mesh and engine, equals a plain loop of transformers in one process."""

from functools import cache
from itertools import product

import pytest
import torch
from decoder_runs import LORA, fit, plain_loop
from tiers import tiered

MESHES = {"1x2": (2, 2), "2x2": (4, 2)}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@cache
def expected(dtype, lora=False, name=None):
    return plain_loop(dtype, *(({"config": None, "name": name}, LORA) if lora else ()))


def compare(found, wanted, tolerance):
    (losses, parameters), (right, best) = found, wanted
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(right), rtol=tolerance, atol=tolerance)
    assert {name: x for name, x in parameters.items() if name not in best} == {}
    for name, x in parameters.items():
        torch.testing.assert_close(x, best[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_the_plain_loop_learns():
    losses, _ = expected("float64")
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(("sharding", "mesh"), tiered(product(["ddp", "fsdp2"], MESHES), quick=[("ddp", "1x2")]))
def test_float64_equals_a_plain_loop(trainers, sharding, mesh):
    world, size = MESHES[mesh]
    for found in trainers.run(world, fit, "float64", sharding, size):
        compare(found, expected("float64"), 1e-6)


@pytest.mark.long
@pytest.mark.parametrize("mesh", MESHES)
def test_float32_of_deepspeed_equals_a_plain_loop(deepspeed_trainers, mesh):
    world, size = MESHES[mesh]
    for found in deepspeed_trainers(world).run(world, fit, "float32", "deepspeed_stage_3", size):
        compare(found, expected("float32"), 1e-4)
