"""A checkpoint of one mesh is resumed on another, and the losses go on as if nothing had been."""

from functools import cache
from itertools import product

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_training import FLOAT32, FLOAT64, compare
from tiers import tiered
from torch.utils.data import DataLoader
from trained import (
    SMALL_BUCKETS,
    Module,
    adamw,
    collated,
    fit,
    fit_and_save,
    quiet,
    reference,
    samples,
    started,
    sums,
    trainer_of,
)

from lightning_longnet import sequence_context
from lightning_longnet.strategies import RingSequenceParallelStrategy
from lightning_longnet.strategies.full_checkpoint import load_full_checkpoint

TWO_EPOCHS = {"samples": samples(24), "micro_batches": 6, "epochs": 2}
DEEPSPEED = {**FLOAT32, "optimizer": adamw}  # its universal format knows the states of Adam alone
STEPS = (2, 3)  # in the middle of the first epoch, and at its end
OTHERS = {"2x1": (2, 1), "1x1": (1, 1)}


@cache
def expected(dtype):
    """The losses and parameters of a plain loop."""
    (setting,) = (each for each in (FLOAT64, DEEPSPEED) if each["dtype"] == dtype)
    return reference({**setting, **TWO_EPOCHS})


def check(trainers, sharding, setting, folder, tolerance, meshes=OTHERS):
    setting = {**setting, **TWO_EPOCHS}
    losses, parameters = expected(setting["dtype"])
    for result in trainers(2).run(2, fit_and_save, setting, sharding, 2, folder):
        compare(result, (losses, parameters), tolerance)
    for world, size in (OTHERS[mesh] for mesh in meshes):
        for step in STEPS:
            finished = step * setting["accumulate"]
            rest = losses[finished:], parameters
            for result in trainers(world).run(world, fit, setting, sharding, size, f"{folder}/step={step}.ckpt"):
                compare(result, rest, tolerance)


@pytest.mark.parametrize(
    ("sharding", "mesh"), tiered(product(["ddp", "fsdp2", "hsdp"], OTHERS), quick=[("fsdp2", "2x1")], long=[])
)
def test_float64_goes_on_elsewhere(trainers, sharding, mesh, tmp_path):
    check(lambda _: trainers, sharding, FLOAT64, str(tmp_path), 1e-9, [mesh])


@pytest.mark.parametrize("stage", tiered([1, 2, 3], quick=[], long=[]))
def test_deepspeed_goes_on_elsewhere(deepspeed_trainers, stage, tmp_path):
    check(deepspeed_trainers, f"deepspeed_stage_{stage}", DEEPSPEED, str(tmp_path), 1e-5)


def fit_and_save_one_file(rank, world, setting, folder):
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"engine": {"save_distributed_checkpoint": False}}
    return fit(rank, world, setting, "fsdp2", world, callbacks=[saving], **options)


def resume_one_file(rank, world, setting, path):
    return fit(rank, world, setting, "fsdp2", world, resume_from=path, engine={"save_distributed_checkpoint": False})


@pytest.mark.long
def test_fsdp2_may_save_one_file(trainers, tmp_path):
    setting, (losses, parameters) = {**FLOAT64, **TWO_EPOCHS}, expected(torch.float64)
    trainers.run(2, fit_and_save_one_file, setting, str(tmp_path))
    path = tmp_path / "step=2.ckpt"
    weights = torch.load(path, weights_only=True, mmap=True)["state_dict"]
    started(setting).load_state_dict({name.removeprefix("model."): x for name, x in weights.items()})
    for result in trainers.run(2, resume_one_file, setting, str(path)):
        compare(result, (losses[4:], parameters), 1e-9)


def test_one_file_is_refused_for_parameters_without_a_name(tmp_path):
    module = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW([*module.parameters(), torch.nn.Parameter(torch.zeros(5))])
    path = tmp_path / "held.ckpt"
    torch.save({"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}, path)
    with pytest.raises(ValueError, match=r"holds some that it has not, the first of shape \(5,\)"):
        load_full_checkpoint(path, module, [optimizer], strict=True)


class Both(Module):
    def validation_step(self, batch, batch_idx):
        self.log("val", sequence_context(self).token_mean(*sums(self.model(batch), batch["labels"])))


def run_again(rank, world, sharding):
    """Losses of two fits and what is validated between, of one module."""
    with quiet():
        options = {"engine": SMALL_BUCKETS} if sharding.startswith("deepspeed") else {}
        module = Both(started(DEEPSPEED), adamw)
        rows = DataLoader(DEEPSPEED["samples"], batch_size=4, collate_fn=collated)
        result = []
        for _ in range(2):
            strategy = RingSequenceParallelStrategy(sharding=sharding, **options)
            trainer = trainer_of(strategy, world, max_epochs=1, limit_train_batches=2)
            trainer.fit(module, rows)
            result.append(trainer.validate(module, rows, verbose=False)[0]["val"])
    return result, module.losses


@pytest.mark.parametrize(
    "sharding",
    tiered(["ddp", "fsdp2", "hsdp", "deepspeed_stage_1", "deepspeed_stage_2"], quick=[], long=["deepspeed_stage_2"]),
)
def test_a_module_is_fitted_validated_and_fitted_again(trainers, deepspeed_trainers, sharding):
    workers = deepspeed_trainers(2) if sharding.startswith("deepspeed") else trainers
    (values, losses) = trainers.run(1, run_again, "ddp")[0]
    assert values[1] < values[0]
    for result, others in workers.run(2, run_again, sharding):
        assert result == pytest.approx(values, rel=1e-5)
        assert others == pytest.approx(losses, rel=1e-5)
