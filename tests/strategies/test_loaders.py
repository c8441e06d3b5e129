"""Ranks whose loaders differ raise an error together, in the step in which they differ, in any loop."""

from itertools import product

import pytest
from test_training import FLOAT32
from tiers import tiered
from torch.utils.data import DataLoader, IterableDataset
from trained import Module, collated, quiet, samples, started, sums, trainer_of

from lightning_longnet import sequence_context
from lightning_longnet.strategies import RingSequenceParallelStrategy

TIMEOUT = 20  # seconds, after which a hang would end in another error


class Looped(Module):
    """A module that counts its steps in any loop."""

    def __init__(self, *args):
        super().__init__(*args)
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.steps += 1
        loss, count = sums(self.model(batch), batch["labels"])
        context = sequence_context(self)  # groups may end apart, so no mean over all ranks
        self.log("loss", context.sum_parts(loss) / context.sum_parts(count.to(loss.dtype)))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        self.steps += 1
        return sequence_context(self).gather_sequence(self.model(batch))


class Stream(IterableDataset):
    """Batches without a length, or with one that is not true."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Mistaken(Stream):
    def __len__(self):
        return 5


def batches_of(many, seed=3):
    return [collated(samples(2, seed=seed + i)) for i in range(many)]


def loader(kind, rank, odd):
    """The loader of a rank: that of rank `odd` is of another kind than those of the others."""
    own = batches_of(3)
    if rank != odd or kind == "same":
        return DataLoader(Stream(own), batch_size=None)
    if kind == "values":
        own[1] = batches_of(1, seed=9)[0]
    elif kind == "order":
        own[1] = {name: x.flip(0) for name, x in own[1].items()}
    elif kind == "length":
        own[1] = collated(samples(2, length=41))
    elif kind == "rows":
        own[1] = collated(samples(3))
    elif kind == "type":
        own[1] = {**own[1], "input_ids": own[1]["input_ids"].int()}
    elif kind == "empty":
        own[1] = {}
    elif kind == "none":
        own[1] = None
    elif kind == "short":
        own = own[:2]
    elif kind == "nothing":
        own = []
    return DataLoader(Stream(own), batch_size=None)


def loop(rank, world, kind, odd, stage="fit", sharding="ddp", size=2):
    with quiet():
        module = Looped(started(FLOAT32), FLOAT32["optimizer"])
        trainer = trainer_of(RingSequenceParallelStrategy(size, sharding, timeout=TIMEOUT), world)
        if kind == "mistaken":
            data = DataLoader(Mistaken(batches_of(2 if rank == odd else 3)), batch_size=None)
        elif kind == "sized":
            rows = samples(4 if rank == odd else 6)
            data = DataLoader(rows, batch_size=2, collate_fn=collated)
        else:
            data = loader(kind, rank, odd)
        if stage == "late validation":
            trainer.fit(module, loader("same", rank, odd), data)
        else:
            getattr(trainer, stage)(module, data)
    return module.steps


def message_of(trainers, *case, world=2):
    outcomes = trainers.outcomes(world, loop, *case)
    assert [is_result for is_result, _ in outcomes] == [False] * world, outcomes
    assert all(result[0] is ValueError for _, result in outcomes), [result[2][-1500:] for _, result in outcomes]
    return [result[1] for _, result in outcomes]


KINDS = ["values", "order", "length", "rows", "type", "empty", "none"]
OTHER_KIND = ", of other names, shapes or types:"


@pytest.mark.parametrize(
    ("kind", "stage"),
    tiered(
        product(KINDS, ["fit", "validate", "test", "predict"]),
        quick=[("values", "fit")],
        covers=1,
    ),
)
def test_a_later_batch_that_differs_is_an_error_in_its_step(trainers, kind, stage):
    for message in message_of(trainers, kind, 1, stage):
        if kind in ("empty", "none"):
            others = "data_parallel_rank 0 were given a batch that does not fit"
            assert "nothing can be split" in message or others in message
        else:
            assert (
                "must be given the same batches, and ranks 1 of the sequence group hold others than rank 0" in message
            )
            assert (OTHER_KIND in message) == (kind not in ("values", "order"))


ENDS = ["short", "nothing", "mistaken", "sized"]


@pytest.mark.parametrize(
    ("kind", "odd", "stage"),
    tiered(
        product(ENDS, [0, 1], ["fit", "validate", "test", "predict"]),
        quick=[("short", 0, "fit")],
        covers=1,
    ),
)
def test_a_loader_that_ends_on_one_rank_is_an_error(trainers, kind, odd, stage):
    many = 0 if kind == "nothing" else 2
    for message in message_of(trainers, kind, odd, stage):
        assert f"those of rank {odd} end after {many}, while rank {1 - odd} are given more" in message


@pytest.mark.parametrize("kind", tiered(["values", "short"], quick=[], full=["short"]))
def test_validation_within_training_is_compared_too(trainers, kind):
    assert len(set(message_of(trainers, kind, 1, "late validation"))) == 1


@pytest.mark.parametrize("stage", tiered(["fit", "validate", "predict"], quick=[], full=["fit", "predict"]))
def test_groups_that_gather_parameters_need_equally_many_batches(trainers, stage):
    for message in message_of(trainers, "short", 1, stage, "ddp" if stage == "fit" else "fsdp2", 2, world=4):
        assert "end after 2" in message


def uneven_groups(rank, world, stage):
    """The second of two groups has a batch less."""
    with quiet():
        module = Looped(started(FLOAT32), FLOAT32["optimizer"])
        trainer = trainer_of(RingSequenceParallelStrategy(2, "ddp", timeout=TIMEOUT), world)
        getattr(trainer, stage)(module, DataLoader(Stream(batches_of(3 - rank // 2)), batch_size=None))
    return module.steps


@pytest.mark.parametrize("stage", tiered(["validate", "predict"], quick=["predict"]))
def test_groups_that_gather_nothing_may_end_apart(trainers, stage):
    assert trainers.run(4, uneven_groups, stage) == [3, 3, 2, 2]


class Taking(Looped):
    """A module whose step takes its batch itself."""

    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        batch = self.trainer.strategy.batch_to_device(batch)
        self.steps += 1
        return sequence_context(self).token_mean(*sums(self.model(batch), batch["labels"]))


def take(rank, world, kind):
    with quiet():
        module = Taking(started(FLOAT32), FLOAT32["optimizer"])
        trainer = trainer_of(RingSequenceParallelStrategy(timeout=TIMEOUT), world)
        trainer.fit(module, loader(kind, rank, 1))
    return module.steps


@pytest.mark.long
def test_batches_that_a_step_takes_itself_are_compared(trainers):
    assert trainers.run(2, take, "same") == [3, 3]
    for is_result, result in trainers.outcomes(2, take, "length"):
        assert not is_result
        assert "hold others than rank 0, of other names, shapes or types" in result[1], result[2]
    for is_result, result in trainers.outcomes(2, take, "short"):
        assert not is_result
        assert "those of rank 1 end after 2" in result[1], result[2]


def fit_unequal_shares(rank, world):
    """The loader of one rank is longer than that of the other, and validation begins after a half of each."""
    with quiet():
        module = Looped(started(FLOAT32), FLOAT32["optimizer"])
        trainer = trainer_of(RingSequenceParallelStrategy(timeout=TIMEOUT), world, val_check_interval=0.5)
        rows = samples(12 + 4 * rank)
        trainer.fit(module, DataLoader(rows, 2, collate_fn=collated), loader("same", rank, 0))


def test_validation_begins_together(trainers):
    for is_result, result in trainers.outcomes(2, fit_unequal_shares):
        assert not is_result
        assert "begin validation after the same batch, and rank 0 would after 3, and others not" in result[1], result[2]


def fit_epochs(rank, world, settings):
    with quiet():
        module = Looped(started(FLOAT32), FLOAT32["optimizer"])
        trainer = trainer_of(RingSequenceParallelStrategy(timeout=TIMEOUT), world, **{"max_epochs": 2, **settings})
        own = batches_of(3 + rank) if settings else batches_of(3)
        trainer.fit(module, DataLoader(Stream(own), batch_size=None), loader("same", rank, 0))
    return module.steps, trainer.global_step


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, (2 + 2 * 6, 6)),
        # a rank that would have more does not matter where the run ends before
        pytest.param({"limit_train_batches": 3, "num_sanity_val_steps": 0}, (2 * 6, 6), marks=pytest.mark.long),
        pytest.param({"max_steps": 3, "limit_val_batches": 0}, (3, 3), marks=pytest.mark.full),
        pytest.param({"max_steps": 2, "limit_val_batches": 0, "max_epochs": -1}, (2, 2), marks=pytest.mark.full),
    ],
)
def test_loaders_that_fit_run_on(trainers, settings, steps):
    assert trainers.run(2, fit_epochs, settings) == [steps] * 2
