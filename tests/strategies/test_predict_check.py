"""The split check of the first predict batch in a run."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from faults import VOCABULARY, OurAttention
from torch.utils.data import DataLoader
from trained import trainer_of

from lightning_longnet import LongNetModule
from lightning_longnet.split_check import SplitMismatch
from lightning_longnet.strategies import first_batch


class Predicts(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = OurAttention()

    def predict_step(self, batch, batch_idx):
        return self.model.logits(batch)


class PredictsByPart(Predicts):
    def predict_step(self, batch, batch_idx):
        return self.model.first(self.model.embedding(batch["input_ids"])).mean(1)


def rows():
    ids = torch.randint(VOCABULARY, (2, 65), generator=torch.Generator().manual_seed(0))
    return DataLoader([{"input_ids": row[:-1]} for row in ids], batch_size=2)


def run_predict(rank, world, kind, sharding):
    from lightning_longnet.strategies import RingSequenceParallelStrategy

    strategy = RingSequenceParallelStrategy(2, sharding, split_check="error")
    return len(trainer_of(strategy, world).predict(kind(), rows()))


@pytest.mark.parametrize("sharding", ["ddp", pytest.param("fsdp2", marks=pytest.mark.full)])
def test_the_first_predict_batch_of_a_run_is_checked(trainers, sharding):
    assert trainers.run(2, run_predict, Predicts, sharding) == [1, 1]
    for is_result, value in trainers.outcomes(2, run_predict, PredictsByPart, sharding):
        assert not is_result
        assert value[0] is SplitMismatch
        assert "what predict_step returns on 2 ranks differs" in value[1]


class Continues(LongNetModule):
    """A user's subclass, which may attend by itself."""


@pytest.mark.parametrize(("kind", "lines"), [(Continues, 1), (LongNetModule, 0)])
def test_a_subclass_that_continues_texts_is_named(kind, lines, monkeypatch):
    shown = []
    monkeypatch.setattr(first_batch, "rank_zero_info", shown.append)
    trainer = SimpleNamespace(training=False, testing=False, predicting=True, lightning_module=object.__new__(kind))
    strategy = SimpleNamespace(sequence_context=SimpleNamespace(sequence_parallel_size=2))
    check = first_batch.FirstBatchCheck("error")
    assert not any(check.is_due(strategy, trainer) for _ in range(2))
    assert len(shown) == lines
    assert all("not made, as Continues has the predict step of this package" in line for line in shown)
