"""NaN on one rank without the guard: every rank says so, or raises."""

import warnings

import pytest
import torch
from tiers import tiered
from torch.utils.data import DataLoader
from trained import Module, quiet, sgd, started, sums, trainer_of

from lightning_longnet.callbacks import NonFiniteGuard
from lightning_longnet.strategies import RingSequenceParallelStrategy


class Broken(Module):
    """Its loss is NaN on the last rank, in one step; no rank reduces it."""

    def __init__(self, step):
        super().__init__(started({"dropout": 0.0, "dtype": torch.float32}), sgd)
        self.step = step

    def training_step(self, batch, batch_idx):
        loss = self.model(batch).sum()
        is_bad = self.trainer.global_step == self.step and self.global_rank == self.trainer.world_size - 1
        return loss * torch.nan if is_bad else loss * 0.0


def fit(rank, world, sharding, step, steps, every, anomaly=False, guarded=False):
    """(the error, the lines that a rank says) of a run."""
    module = Broken(step)
    tokens = torch.zeros(1, 32, dtype=torch.long)
    batch = {"input_ids": tokens, "labels": tokens, "attention_mask": tokens + 1}
    error = ""
    with quiet(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trainer_of(
            RingSequenceParallelStrategy(sharding=sharding, split_check="off"),
            world,
            max_steps=steps,
            log_every_n_steps=every,
            detect_anomaly=anomaly,
            callbacks=[NonFiniteGuard()] if guarded else [],
        )
        try:
            trainer.fit(module, DataLoader([batch] * 8, batch_size=None))
        except FloatingPointError as raised:
            error = str(raised)
    return error, [str(each.message) for each in caught if "the training loss of step" in str(each.message)]


@pytest.mark.parametrize("sharding", tiered(["ddp", "fsdp2"], quick=["ddp"]))
def test_every_rank_says_once_that_its_loss_is_not_finite(trainers, sharding):
    for rank, (error, lines) in enumerate(trainers.run(2, fit, sharding, 1, 6, 1)):
        assert not error
        assert len(lines) == 1
        assert f"rank {rank}: the training loss of step {3 - rank} is nan" in lines[0]
        assert "NonFiniteGuard" in lines[0]


def test_the_last_step_counts_where_none_is_logged(trainers):
    result = trainers.run(2, fit, "ddp", 1, 4, 50)
    assert [len(lines) for _, lines in result] == [1, 1]
    assert all("step 4 is nan" in lines[0] for _, lines in result)


@pytest.mark.long
def test_nothing_is_said_of_finite_losses_or_beside_the_guard(trainers):
    assert trainers.run(2, fit, "ddp", -1, 2, 1) == [("", [])] * 2
    assert trainers.run(2, fit, "ddp", 1, 3, 1, False, True) == [("", [])] * 2


def test_detected_anomalies_end_all_ranks(trainers):
    result = trainers.run(2, fit, "ddp", 1, 4, 1, True)
    assert [error for error, _ in result] == ["the training loss is not finite on ranks 1"] * 2


class Averaged(Module):
    """Its loss is a mean over the tokens of all ranks, or over those of each rank alone."""

    def __init__(self, kind):
        super().__init__(started({"dropout": 0.0, "dtype": torch.float64}), sgd)
        self.kind = kind

    def training_step(self, batch, batch_idx):
        if self.kind == "all":
            return super().training_step(batch, batch_idx)
        return sums(self.model(batch), batch["labels"])[0] / batch["labels"].numel()


def fit_where_one_is_empty(rank, world, kind):
    """(losses, the lines that a rank says) of a run in which the second data-parallel group has an empty batch."""
    module = Averaged(kind)
    tokens = torch.arange(32)[None] % 7
    batches = [{"input_ids": tokens, "labels": tokens, "attention_mask": tokens * 0 + 1} for _ in range(3)]
    if rank == 1:
        batches[1] = {name: x[:0] for name, x in batches[1].items()}
    with quiet(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strategy = RingSequenceParallelStrategy(1, "ddp", split_check="off")
        trainer = trainer_of(strategy, world, max_steps=3, log_every_n_steps=1, use_distributed_sampler=False)
        trainer.fit(module, DataLoader(batches, batch_size=None))
    warned = [str(each.message) for each in caught if "the training loss of step" in str(each.message)]
    return module.losses, warned


def test_an_empty_batch_of_one_group_counts_no_token(trainers):
    (losses, warned), (others, _) = trainers.run(2, fit_where_one_is_empty, "all")
    assert losses == others
    assert all(loss == loss for loss in losses)
    assert not warned


def test_a_mean_over_no_rows_is_announced_where_it_is_taken(trainers):
    (_, first), (_, second) = trainers.run(2, fit_where_one_is_empty, "own")
    assert not first, "no row has a gradient, so that the parameters stay as they are"
    assert len(second) == 1
    assert "rank 1: the training loss of step 2 is nan" in second[0]
