"""The tokens of a batch are counted along the dimension that is the sequence."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from trained import quiet, trainer_of

from lightning_longnet import DilatedSelfAttention, Pattern, sequence_context
from lightning_longnet.callbacks import TokenThroughput
from lightning_longnet.callbacks.throughput import size_of
from lightning_longnet.strategies import RingSequenceParallelStrategy

LENGTH = 37


@pytest.mark.parametrize(
    ("batch", "dims", "size"),
    [
        ({"input_ids": torch.zeros(4, 37)}, {}, (4, 37, 37)),
        ({"x": torch.zeros(37, 4, 8)}, {"x": 0}, (4, 37, 37)),
        ({"x": torch.zeros(37, 8), "y": torch.zeros(37, 4).long()}, {"x": 0, "y": 0}, (4, 37, 37)),
        ({"x": torch.zeros(37, 8)}, {"x": 0}, (1, 37, 37)),
        ({"x": torch.zeros(37, 4, 8), "label": torch.zeros(4)}, {"x": 0, "label": None}, (4, 37, 37)),
        ({"documents": torch.zeros(37), "input_ids": torch.zeros(4, 37)}, {}, (4, 37, 37)),
        ({"documents": torch.zeros(37), "x": torch.zeros(37, 4, 8)}, {"x": 0}, (4, 37, 37)),
        ({"x": torch.zeros(4, 8, 37)}, {"x": -1}, (4, 37, 37)),
        ({"pixels": torch.zeros(5, 3, 4, 4)}, {"pixels": None}, (5, 0, 0)),
    ],
)
def test_the_size_of_a_batch(batch, dims, size):
    module = L.LightningModule()
    module.sequence_dims = dims
    assert size_of(batch, module) == size


class TokensFirst(L.LightningModule):
    """A module whose batches are (tokens, samples, width)."""

    sequence_dims = {"x": 0}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.attention = DilatedSelfAttention(8, 2, Pattern.dense())

    def training_step(self, batch, batch_idx):
        out = self.attention(batch["x"].transpose(0, 1))
        return sequence_context(self).token_mean(out.square().sum(), out.numel())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def watched(rank, world):
    torch.manual_seed(0)  # the ranks of a sequence are given the same batches
    with quiet():
        monitor = TokenThroughput(peak_flops=1e9)
        trainer = trainer_of(
            RingSequenceParallelStrategy(sharding="ddp"), world, max_steps=2, log_every_n_steps=1, callbacks=[monitor]
        )
        loader = DataLoader(torch.randn(8, LENGTH, 8), 4, collate_fn=lambda rows: {"x": torch.stack(rows, 1)})
        trainer.fit(TokensFirst(), loader)
    return monitor.figures["throughput/tokens"], sum(monitor.by_rank["samples"])


def test_tokens_in_the_first_dimension_are_counted_once(trainers):
    assert trainers.run(2, watched) == [(8 * LENGTH, 4)] * 2
