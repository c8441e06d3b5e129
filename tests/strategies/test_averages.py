"""Callbacks that average weights validate with the average and train on with the weights, whatever shards them."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from test_features import PLAIN, Alternating
from test_training import compare
from tiers import tiered
from torch.utils.data import DataLoader
from trained import SMALL_BUCKETS, KeepParameters, Module, adamw, collated, quiet, started, sums, trainer_of

from lightning_longnet import sequence_context
from lightning_longnet.strategies import RingSequenceParallelStrategy


class Checked(Module):
    """A module that keeps the losses of validation."""

    def validation_step(self, batch, batch_idx):
        loss = sequence_context(self).token_mean(*sums(self.model(batch), batch["labels"]))
        self.losses.append(loss.item())


class CheckedByHand(Checked, Alternating):
    """The same with optimisers that are stepped by hand."""


def loader(rows, batch_size):
    return DataLoader(rows, batch_size=batch_size, collate_fn=collated, shuffle=True)


def fit_averaged(rank, world, kind, sharding, dtype=torch.float64, folder=None, resume=None):
    with quiet():
        module = kind(started({**PLAIN, "dtype": dtype}), adamw)
        averaging, kept = EMAWeightAveraging(decay=0.5), KeepParameters()
        saving = [] if folder is None else [ModelCheckpoint(folder, "{epoch}", save_top_k=-1)]
        engine = SMALL_BUCKETS if sharding.startswith("deepspeed") else {}
        trainer = trainer_of(
            RingSequenceParallelStrategy(world, sharding, engine=engine),
            world,
            callbacks=[averaging, kept, *saving],
            enable_checkpointing=folder is not None,
            limit_train_batches=2,
            val_check_interval=1,
            max_epochs=2,
        )
        trainer.fit(module, loader(PLAIN["samples"], 4), loader(PLAIN["samples"][:4], 2), ckpt_path=resume)
    return module.losses, kept.parameters


@pytest.mark.parametrize(
    ("kind", "sharding"),
    tiered(
        [(kind, name) for kind in (Checked, CheckedByHand) for name in ("fsdp2", "hsdp", "fsdp2_offload")],
        quick=[],
        long=[(Checked, "fsdp2"), (CheckedByHand, "hsdp")],
    ),
)
def test_validation_takes_the_average_and_training_goes_on(trainers, kind, sharding):
    expected = trainers.run(1, fit_averaged, kind, "ddp")[0]
    assert len(expected[0]) == 2 + 4 + 8
    for result in trainers.run(2, fit_averaged, kind, sharding):
        compare(result, expected, 1e-9)


@pytest.mark.long
def test_a_run_with_an_average_is_saved_and_resumed(trainers, tmp_path):
    losses, parameters = trainers.run(2, fit_averaged, Checked, "fsdp2", torch.float64, tmp_path)[0]
    resume = str(tmp_path / "epoch=0.ckpt")
    for result in trainers.run(2, fit_averaged, Checked, "fsdp2", torch.float64, tmp_path / "resumed", resume):
        compare((result[0][-6:], result[1]), (losses[-6:], parameters), 1e-9)


@pytest.mark.parametrize("stage", tiered([2, 3], quick=[], full=[2]))
def test_deepspeed_averages_what_it_does_not_shard(trainers, deepspeed_trainers, stage):
    outcomes = deepspeed_trainers(2).outcomes(2, fit_averaged, Checked, f"deepspeed_stage_{stage}", torch.float32)
    expected = trainers.run(1, fit_averaged, Checked, "ddp", torch.float32)[0] if stage == 2 else None
    for is_result, result in outcomes:
        assert is_result == (stage == 2), result
        if is_result:
            compare(result, expected, 1e-5)
        else:
            assert "'deepspeed_stage_3' takes no callback that averages weights" in result[1]
