"""Samples that do not divide over groups count once in metrics, and training data keeps the order of its loader."""

import warnings
from functools import cache
from itertools import product

import lightning as L
import pytest
import torch
from test_module import module, rows
from test_training import MESHES
from tiers import tiered
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler, SequentialSampler
from trained import SMALL_BUCKETS, quiet, trainer_of

from lightning_longnet import LongViTConfig, LongViTModule, Pattern, sequence_context
from lightning_longnet.data.order import GlobalOrder
from lightning_longnet.strategies import RingSequenceParallelStrategy
from lightning_longnet.strategies.samplers import repeated_in


@pytest.mark.parametrize(
    "make", [DistributedSampler, lambda *a, **k: GlobalOrder(a[0].stop, 2, *k.values(), end="repeat")]
)
def test_each_sample_counts_on_one_rank(make):
    for samples, groups, size in product((1, 4, 13, 16), (1, 2, 3, 5), (1, 2, 4)):
        counted = 0
        for rank in range(groups):
            sampler = make(range(samples), num_replicas=groups, rank=rank)
            loader = DataLoader(range(samples), size, sampler=sampler)
            for i, batch in enumerate(loader):
                result = repeated_in(loader, i)
                assert 0 <= result <= len(batch)
                counted += len(batch) - result
        assert counted == samples


def test_nothing_is_known_of_other_loaders():
    data = range(13)
    samplers = [None, SequentialSampler(data), DistributedSampler(data, 2, 1, drop_last=True)]
    samplers += [GlobalOrder(13, 2, 2, 1, end=end) for end in ("drop", "ignore", "ragged")]
    for sampler in samplers:
        assert not any(repeated_in(DataLoader(data, 2, sampler=sampler), i) for i in range(7))
    own = DataLoader(data, batch_sampler=BatchSampler(DistributedSampler(data, 2, 1), 2, drop_last=False))
    assert repeated_in(own, 3) == 0
    assert repeated_in([1, 2], 0) == 0


def images(many):
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(3, (many,), generator=generator)
    return [{"pixels": torch.randn(3, 8, 8, generator=generator), "label": label} for label in labels]


def vision():
    torch.manual_seed(2)
    config = LongViTConfig(Pattern.dense(), classes=3, patch_size=2, dim=16, layers=1, heads=2)
    return LongViTModule(config)


def evaluate(rank, world, size, sharding, model="text"):
    """The metrics of validation and test of 13 samples, and the warnings about them."""
    with quiet(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = SMALL_BUCKETS if sharding.startswith("deepspeed") else {}
        trainer = trainer_of(RingSequenceParallelStrategy(size, sharding, engine=engine), world)
        made, data = (module(), rows(13, 2)) if model == "text" else (vision(), images(13))
        loader = DataLoader(data, batch_size=4)
        result = trainer.validate(made, loader, verbose=False) + trainer.test(made, loader, verbose=False)
    return result, [str(each.message) for each in caught if "do not divide" in str(each.message)]


@cache
def expected(trainers, model):
    return trainers.run(1, evaluate, 1, "ddp", model)[0][0]


CASES = list(product(["ddp", "fsdp2", "hsdp", "deepspeed_stage_1", "deepspeed_stage_3"], ["2x1", "2x2"]))


@pytest.mark.parametrize(("sharding", "mesh"), tiered(CASES, quick=[("ddp", "2x1")], covers=1))
def test_metrics_are_exact_where_samples_do_not_divide(trainers, deepspeed_trainers, sharding, mesh):
    world, size = MESHES[mesh]
    workers = deepspeed_trainers(world) if sharding.startswith("deepspeed") else trainers
    for rank, (result, messages) in enumerate(workers.run(world, evaluate, size, sharding)):
        for each, right in zip(result, expected(trainers, "text"), strict=True):
            assert each == pytest.approx(right, rel=1e-6)
        assert len(messages) == (rank == 0)
        if messages:
            assert "13 samples do not divide over 2 data-parallel groups, and 1 of them is repeated" in messages[0]
            assert "repeated_samples" in messages[0]


@pytest.mark.parametrize("mesh", tiered(["2x1", "2x2"], quick=[], full=["2x2"]))
def test_images_count_once(trainers, mesh):
    world, size = MESHES[mesh]
    for result, _ in trainers.run(world, evaluate, size, "ddp", "images"):
        for each, right in zip(result, expected(trainers, "images"), strict=True):
            assert each == pytest.approx(right, rel=1e-5)


class Ordered(L.LightningModule):
    """A module that keeps the numbers of its samples."""

    sequence_dims = {"batch": None}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen += batch.tolist()
        return (self.weight * batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class Reversed(Sampler):
    """A sampler with an order of its own."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(range(len(self.data))[::-1])

    def __len__(self):
        return len(self.data)


class Several(Ordered):
    """A module with several loaders, which keeps the samples that count of each."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        counted = len(batch) - sequence_context(self).repeated_samples
        self.seen.append((dataloader_idx, batch[:counted].tolist()))


def several(rank, world):
    with quiet():
        made = Several()
        trainer = trainer_of(RingSequenceParallelStrategy(1, "ddp"), world, limit_val_batches=2)
        trainer.validate(made, [DataLoader(torch.arange(float(n)), 2) for n in (5, 4, 7, 3)], verbose=False)
    return made.seen


def test_repeats_are_those_of_each_loader(trainers):
    first, second = trainers.run(2, several)
    assert first == [(0, [0, 2]), (0, [4]), (1, [0, 2]), (2, [0, 2]), (2, [4, 6]), (3, [0, 2])]
    assert second == [(0, [1, 3]), (0, []), (1, [1, 3]), (2, [1, 3]), (2, [5]), (3, [1])]


def order(rank, world, kind):
    with quiet():
        data = torch.arange(8.0)
        options = {"sampler": Reversed(data)} if kind == "own" else {"shuffle": kind == "shuffled"}
        made = Ordered()
        trainer = trainer_of(RingSequenceParallelStrategy(1, "ddp"), world, max_epochs=2)
        trainer.fit(made, DataLoader(data, 2, **options))
    assert "_resolve_sampler" not in trainer._data_connector.__dict__
    return made.seen


@pytest.mark.long
def test_training_data_keeps_its_order_unless_it_is_shuffled(trainers):
    assert trainers.run(2, order, "sequential") == [[0, 2, 4, 6] * 2, [1, 3, 5, 7] * 2]
    shuffled = trainers.run(2, order, "shuffled")
    assert sorted(shuffled[0][:4] + shuffled[1][:4]) == list(range(8))
    assert shuffled[0][:4] != shuffled[0][4:]
    assert shuffled[0][:4] != [0, 2, 4, 6]


def test_a_sampler_with_an_order_of_its_own_keeps_it(trainers):
    assert trainers.run(2, order, "own") == [[7, 5, 3, 1] * 2, [6, 4, 2, 0] * 2]
