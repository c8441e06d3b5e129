"""A checkpoint of one mesh is resumed on another, and the losses go on as if nothing had been."""

import pytest
from test_training import FLOAT32, FLOAT64, compare
from trained import adamw, fit, fit_and_save, reference, samples

TWO_EPOCHS = {"samples": samples(24), "micro_batches": 6, "epochs": 2}
DEEPSPEED = {**FLOAT32, "optimizer": adamw}  # its universal format knows the states of Adam alone
STEPS = (2, 3)  # in the middle of the first epoch, and at its end
OTHERS = {"2x1": (2, 1), "1x1": (1, 1)}


@pytest.fixture(scope="module")
def wanted():
    return {each["dtype"]: reference({**each, **TWO_EPOCHS}) for each in (FLOAT64, DEEPSPEED)}


def check(trainers, sharding, setting, wanted, folder, tolerance):
    setting = {**setting, **TWO_EPOCHS}
    losses, parameters = wanted[setting["dtype"]]
    for found in trainers(2).run(2, fit_and_save, setting, sharding, 2, folder):
        compare(found, (losses, parameters), tolerance)
    for world, size in OTHERS.values():
        for step in STEPS:
            finished = step * setting["accumulate"]
            rest = losses[finished:], parameters
            for found in trainers(world).run(world, fit, setting, sharding, size, f"{folder}/step={step}.ckpt"):
                compare(found, rest, tolerance)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2", "hsdp"])
def test_float64_goes_on_elsewhere(trainers, sharding, wanted, tmp_path):
    check(lambda _: trainers, sharding, FLOAT64, wanted, str(tmp_path), 1e-9)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_goes_on_elsewhere(deepspeed_trainers, stage, wanted, tmp_path):
    check(deepspeed_trainers, f"deepspeed_stage_{stage}", DEEPSPEED, wanted, str(tmp_path), 1e-5)
