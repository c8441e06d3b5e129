"""What is dropped under the strategy: only the training step decides it, and a run that is resumed repeats it."""

import os

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from trained import PATTERN, VOCABULARY, WIDTH, collated, quiet, samples, trainer_of

from lightning_longnet import sequence_context
from lightning_longnet.strategies import RingSequenceParallelStrategy


def recording():
    """A module that drops in training and in evaluation, and keeps what it dropped by the number of the batch."""
    import lightning as L

    class Recording(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, WIDTH)
            self.dropout = nn.Dropout(0.5)
            self.head = nn.Linear(WIDTH, VOCABULARY)
            self.training_drops, self.evaluation_drops = {}, {}

        def _compute(self, batch):
            x = self.embedding(batch["input_ids"])
            context = sequence_context(self)
            ones = torch.ones(*x.shape[:2], 2, 8)
            pairs = context.attend(ones, ones, ones, PATTERN, dropout=0.5, layer=0)
            dropped = self.dropout(x)
            return dropped, ((dropped != 0).tolist(), pairs.tolist())

        def training_step(self, batch, batch_idx):
            dropped, drops = self._compute(batch)
            self.training_drops[self.trainer.fit_loop.epoch_loop.total_batch_idx] = drops
            loss = self.head(dropped).logsumexp(-1)
            return sequence_context(self).token_mean(loss.sum(), loss.numel())

        def validation_step(self, batch, batch_idx):
            self.train()
            _, drops = self._compute(batch)
            self.eval()
            kind = "sanity" if self.trainer.sanity_checking else self.trainer.fit_loop.epoch_loop.total_batch_idx
            self.evaluation_drops[kind, batch_idx] = drops

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Recording()


def train(rank, world, folder, resume=None, sharding="ddp", seed=5, **options):
    os.environ["PL_GLOBAL_SEED"] = str(seed)
    with quiet():
        torch.manual_seed(7)
        module = recording()
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        options = {"limit_val_batches": 2, "val_check_interval": 2, "num_sanity_val_steps": 1, **options}
        trainer = trainer_of(
            RingSequenceParallelStrategy(2, sharding), world, callbacks=[saving], enable_checkpointing=True, **options
        )
        loaders = [DataLoader(samples(8, seed=i), batch_size=2, collate_fn=collated) for i in (3, 4)]
        if resume is not None:
            torch.manual_seed(99)  # torch's generator of a new process is not where the first one's was
        trainer.fit(module, *loaders, ckpt_path=resume)
        context = trainer.strategy.sequence_context
        torch.manual_seed(1)
        ones = torch.ones(1, 9, 2, 8)
        after = [context.attend(ones, ones, ones, PATTERN, dropout=0.5, layer=0).tolist() for _ in range(2)]
    return module.training_drops, module.evaluation_drops, after


@pytest.mark.parametrize("sharding", ["ddp", pytest.param("fsdp2", marks=pytest.mark.full)])
def test_only_training_decides_what_training_drops(trainers, tmp_path, sharding):
    first, second = trainers.run(2, train, str(tmp_path), None, sharding)
    training, evaluation, after = first
    assert sorted(training) == [0, 1, 2, 3]
    assert set(evaluation) == {("sanity", 0), (1, 0), (1, 1), (3, 0), (3, 1)}
    drops = [*training.values(), *evaluation.values()]
    for kind in (0, 1):  # plain dropout, and pairs of attention
        seen = [str(each[kind]) for each in drops]
        assert len(set(seen)) == len(seen)
    for number, each in training.items():
        assert each[0] != second[0][number][0]
    assert after[0] != after[1]

    bare = trainers.run(2, bare_run, str(tmp_path / "bare"), sharding)
    assert [each[0] for each in bare] == [first[0], second[0]]

    resumed = trainers.run(2, train, str(tmp_path / "resumed"), str(tmp_path / "step=2.ckpt"), sharding)
    for result, whole in zip(resumed, (first, second), strict=True):
        assert result[0] == {number: whole[0][number] for number in (2, 3)}
        assert {key: value for key, value in result[1].items() if key[0] == 3} == {
            key: value for key, value in whole[1].items() if key[0] == 3
        }


def bare_run(rank, world, folder, sharding):
    """The same without validation."""
    return train(rank, world, folder, None, sharding, limit_val_batches=0)
