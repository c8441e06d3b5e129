"""Losses and metrics of validation, test and predict are those of one process, however samples and tokens are split."""

import lightning as L
import pytest
import torch
from test_training import MESHES
from tiers import tiered
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity
from trained import VOCABULARY, Model, collated, quiet, samples, sums, trainer_of

from lightning_longnet import sequence_context
from lightning_longnet.strategies import RingSequenceParallelStrategy

ROWS = samples(8, seed=9)


class Evaluated(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.model = Model()
        self.perplexity = Perplexity(ignore_index=-100)
        self.accuracy = MulticlassAccuracy(VOCABULARY, average="micro", ignore_index=-100)
        self.count, self.real = SumMetric(), MeanMetric()
        self.predicted = []

    def setup(self, stage):
        context = sequence_context(self)
        for metric in (self.count, self.real):
            context.per_sample(metric)

    def validation_step(self, batch, batch_idx):
        context = sequence_context(self)
        logits, labels = self.model(batch), batch["labels"]
        self.log("loss", context.token_mean(*sums(logits, labels)), batch_size=len(labels))
        self.log("synced", context.token_mean(*sums(logits, labels)), batch_size=len(labels), sync_dist=True)
        self.perplexity(logits, labels)
        self.accuracy(logits.flatten(0, 1), labels.flatten())
        whole = context.gather_sequence(labels)
        self.count(torch.ones(len(labels)))
        self.real((whole != -100).sum(1).float())
        for name in ("perplexity", "accuracy", "count", "real"):
            self.log(name, getattr(self, name))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return sequence_context(self).gather_sequence(self.model(batch)).argmax(-1)


def evaluate(rank, world, sharding, size, batch_size):
    with quiet():
        options = {"engine": {"reduce_bucket_size": 2**14}} if sharding.startswith("deepspeed") else {}
        trainer = trainer_of(RingSequenceParallelStrategy(size, sharding, **options), world)
        module = Evaluated()
        loader = DataLoader(ROWS, batch_size=batch_size, collate_fn=collated)
        validated = trainer.validate(module, loader, verbose=False)[0]
        tested = trainer.test(module, loader, verbose=False)[0]
        predicted = torch.cat(trainer.predict(module, loader))
    return validated, tested, predicted, trainer.strategy.sequence_context.data_parallel_rank


@pytest.fixture(scope="module")
def expected():
    module = Evaluated().eval()
    with torch.no_grad():
        logits = [module.model(collated(ROWS[i : i + 4])) for i in (0, 4)]
    labels = [collated(ROWS[i : i + 4])["labels"] for i in (0, 4)]
    losses = [torch.divide(*sums(x, y)).item() for x, y in zip(logits, labels, strict=True)]
    nats, tokens = sums(torch.cat(logits), torch.cat(labels))
    right = (torch.cat(logits).argmax(-1) == torch.cat(labels)).sum()
    figures = {
        "loss": sum(losses) / 2,
        "synced": sum(losses) / 2,
        "perplexity": (nats / tokens).exp().item(),
        "accuracy": (right / tokens).item(),
        "count": 8.0,
        "real": tokens.item() / 8,
    }
    return figures, torch.cat(logits).argmax(-1)


CASES = [("ddp", mesh) for mesh in MESHES] + [("fsdp2", "1x2"), ("hsdp", "2x2")]
CASES += [("deepspeed_stage_1", "1x2"), ("deepspeed_stage_3", "1x2")]


@pytest.mark.parametrize(
    ("sharding", "mesh"), tiered(CASES, quick=[("fsdp2", "1x2")], long=[("deepspeed_stage_3", "1x2")])
)
def test_figures_are_those_of_one_process(trainers, deepspeed_trainers, expected, sharding, mesh):
    world, size = MESHES[mesh]
    workers = deepspeed_trainers(world) if sharding.startswith("deepspeed") else trainers
    figures, best = expected
    for validated, tested, predicted, rank in workers.run(world, evaluate, sharding, size, 4 * size // world):
        for result in (validated, tested):
            assert result == pytest.approx(figures, rel=2e-5), mesh
        mine = torch.arange(8)[rank :: world // size]  # as the sampler deals them out
        assert torch.equal(predicted, best[mine])
