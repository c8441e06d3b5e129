"""The split check on what changes no gradient: results of predict steps, logged numbers, and buffers."""

import warnings

import lightning as L
import pytest
import torch
from faults import Base, Cumulative, OurAttention
from test_split_check import LENGTH, batch_of, connected
from torch import nn
from torchmetrics import Metric

from lightning_longnet import attach_context, check_split, sequence_context
from lightning_longnet.split_check.verdict import shown


class Predicting(OurAttention):
    """Rows of tokens in a structure, flattened rows, texts, and a result of the first rank alone."""

    def step(self, batch):
        logits, context = self.logits(batch), sequence_context(self)
        whole = context.gather_sequence(logits)
        first = {"whole": whole} if context.sequence_parallel_rank == 0 else {}
        return {"logits": logits, "rows": [logits.flatten(0, 1)], "text": "a", "classes": logits.argmax(-1), **first}


class Pooled(OurAttention):
    def step(self, batch):
        x = self.first(self.embedding(batch["input_ids"]))
        context = sequence_context(self)
        return context.sum_parts(x.sum(1)) / (context.length if context.is_split else x.shape[1])


class PooledOfPart(OurAttention):
    def step(self, batch):
        return self.first(self.embedding(batch["input_ids"])).mean(1)


class OwnAttention(Cumulative):
    def step(self, batch):
        return self.logits(batch)


class Positions(Base):
    def step(self, batch):
        return torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])


class PositionsOfContext(Base):
    def step(self, batch):
        x = self.embedding(batch["input_ids"])
        return sequence_context(self).positions_of(x).expand_as(batch["input_ids"])


class Sampled(Base):
    def step(self, batch):
        return torch.multinomial(self.logits(batch).flatten(0, 1).softmax(-1), 1)


class Texts(Base):
    def step(self, batch):
        return ["a", "b"]


class OtherShapes(Base):
    """The tokens that a rank chooses: neither a part nor what one process has."""

    def step(self, batch):
        return self.logits(batch)[batch["input_ids"] > 5]


RESULTS = {
    Predicting: "equal",
    Pooled: "equal",
    PositionsOfContext: "equal",
    PooledOfPart: "different",
    OwnAttention: "different",
    Positions: "different",
    Sampled: "inconclusive",
    Texts: "not checked",
    OtherShapes: "not checked",
}


def predicted(rank, world, size, placement):
    context, result = connected(rank, world, size), {}
    context.placement = context._splitter.placement = placement
    for kind in RESULTS:
        torch.manual_seed(rank)
        module = kind()
        attach_context(module, context)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result[kind] = check_split(
                module,
                lambda copy, part: copy.step(part),
                batch_of(context.data_parallel_rank),
                context,
                action="warn",
                training=False,
                predicts=True,
            )
    return {kind.__name__: (verdict.kind, verdict.message) for kind, verdict in result.items()}


@pytest.mark.parametrize(
    ("world", "size", "placement"),
    [
        pytest.param(2, 2, "zigzag", marks=pytest.mark.full),
        pytest.param(2, 2, "contiguous", marks=pytest.mark.full),
        pytest.param(4, 2, "contiguous", marks=pytest.mark.full),
    ],
)
def test_results_of_predict_steps_are_those_of_one_process(trainers, world, size, placement):
    every = trainers.run(world, predicted, size, placement)
    assert all(result == every[0] for result in every)
    assert {name: kind for name, (kind, _) in every[0].items()} == {
        kind.__name__: outcome for kind, outcome in RESULTS.items()
    }
    assert "history (Functional) is the first" in every[0]["OwnAttention"][1]
    assert "what predict_step returns on 2 ranks differs" in every[0]["PooledOfPart"][1]


class LateMetric(Metric):
    """A metric that has no value yet."""

    def update(self):
        pass

    def compute(self):
        raise ValueError("no batch of this metric is complete")


class Logging(L.LightningModule):
    """A module whose loss is right."""

    def __init__(self):
        super().__init__()
        self.model = OurAttention()
        self.norm = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))  # whose buffers move alike
        self.tracker = nn.Module()
        self.tracker.register_buffer("mean", torch.zeros(()))
        self.metric = LateMetric()

    def training_step(self, batch, batch_idx=0):
        self.norm(torch.ones(4, dtype=self.norm.weight.dtype))
        logits, context = self.model.logits(batch), sequence_context(self)
        loss = self.model.step(batch)
        self.follow(logits, loss, context)
        return loss

    def follow(self, logits, loss, context):
        """Log right numbers, and update a right buffer."""
        square = context.token_mean(logits.detach().square().sum(), logits.numel())
        self.log("square", square)
        self.log("loss", loss, sync_dist=True)
        self.log("tokens", float(logits.shape[1]), reduce_fx="sum", sync_dist=True)
        self.log("noise", torch.rand(()))
        self.log("largest", logits.detach().max(), reduce_fx="max", sync_dist=True)
        self.log("metric", self.metric)
        self.tracker.mean.lerp_(square.to(self.tracker.mean), 0.1)


class LogsMeanOfPart(Logging):
    def follow(self, logits, loss, context):
        self.log("plain", logits.detach().square().mean(), sync_dist=True)


class LogsMeanOfFirst(Logging):
    def follow(self, logits, loss, context):
        self.log("plain", logits.detach().square().mean())


class TracksPart(Logging):
    def follow(self, logits, loss, context):
        self.tracker.mean.lerp_(logits.detach().square().mean().to(self.tracker.mean), 0.1)


LOGS = {Logging: "", LogsMeanOfPart: "", LogsMeanOfFirst: "logged as plain", TracksPart: "the buffer tracker.mean"}
ODD = {**LOGS, LogsMeanOfPart: "logged as plain"}  # of equal parts the mean of means is the mean


def followed(rank, world, size, length):
    context, result = connected(rank, world, size), {}
    for kind in LOGS:
        torch.manual_seed(rank)
        module = kind()
        attach_context(module, context)
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            verdict = check_split(
                module,
                lambda copy, part: copy.training_step(part),
                batch_of(context.data_parallel_rank, length),
                context,
            )
        assert verdict.kind == "equal", verdict
        result[kind.__name__] = [str(each.message) for each in raised if "of one process" in str(each.message)]

    return result


@pytest.mark.parametrize(
    ("world", "size", "length"),
    [(2, 2, 75), pytest.param(2, 2, LENGTH, marks=pytest.mark.full), pytest.param(4, 2, 75, marks=pytest.mark.full)],
)
def test_logged_numbers_and_buffers_of_a_rank_are_warned_of(trainers, world, size, length):
    first, *others = trainers.run(world, followed, size, length)
    assert not any(lines for result in others for lines in result.values()), "rank 0 alone warns"
    for kind, start in (ODD if length % size else LOGS).items():
        lines = first[kind.__name__]
        assert len(lines) == bool(start), (kind, lines)
        assert all(start in line and "Instead: " in line for line in lines), lines
    tracked = first["TracksPart"][0]
    assert "the buffer tracker.mean of tracker (Module) on 2 ranks differs by" in tracked


@pytest.mark.parametrize(
    ("error", "size"),
    [(1.062, "106.2%"), (0.001, "0.1%"), (4e-4, "0.04%"), (1e-6, "0.0001%"), (4e-7, "a share of 4e-07")],
)
def test_differences_are_shown_in_percent(error, size):
    assert shown(2, error, "the loss") == f"the loss on 2 ranks differs by {size} from that of one process"
