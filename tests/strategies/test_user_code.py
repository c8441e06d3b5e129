"""What users' modules and callbacks do around a step: as in one process, or an error or a warning in one line."""

import warnings
from typing import ClassVar

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from trained import WIDTH, Model, Module, collated, samples, sgd, sums, trainer_of, whole

from lightning_longnet import DilatedSelfAttention, Pattern, sequence_context

pytestmark = pytest.mark.long

ROWS = samples(8)  # of an odd number of tokens


class Double(Module):
    def __init__(self, optimizer=sgd):
        torch.manual_seed(5)
        super().__init__(Model().double(), optimizer)


class ByHand(Double):
    """Manual optimisation that changes gradients between the backward and the step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.clip(optimizer)
        optimizer.step()


class ClippedByNorm(ByHand):
    def clip(self, optimizer):
        nn.utils.clip_grad_norm_(self.parameters(), 0.05)


class ClippedByValue(ByHand):
    def clip(self, optimizer):
        nn.utils.clip_grad_value_(self.parameters(), 0.001)


class ClippedByOwnCode(ByHand):
    def clip(self, optimizer):
        norm = torch.stack([x.grad.norm() for x in self.parameters()]).norm()
        for x in self.parameters():
            x.grad.mul_(min(1.0, 0.05 / float(norm)))


class ClippedByLightning(ByHand):
    def clip(self, optimizer):
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")


class NormsAreLogged(Double):
    def on_before_optimizer_step(self, optimizer):
        self.log("norm", nn.utils.get_total_norm([x.grad for x in self.parameters()]))


class Weighted(Double):
    """A weight for each token, under a name that the module declares."""

    sequence_dims: ClassVar = {"weights": 1}

    def training_step(self, batch, batch_idx):
        labels = batch["labels"]
        losses = F.cross_entropy(self.model(batch).transpose(1, 2), labels, ignore_index=-100, reduction="none")
        weights = batch["weights"] * (labels != -100)
        loss = sequence_context(self).token_mean((losses * weights).sum(), weights.sum())
        self.losses.append(loss.item())
        return loss


class Inner(L.LightningModule):
    """A LightningModule inside of another, with two calls of attention of different patterns, and positions."""

    def __init__(self, model):
        super().__init__()
        self.embedding, self.head = model.embedding, model.head
        self.dense = DilatedSelfAttention(WIDTH, 4, Pattern.dense(is_causal=True))
        self.dilated = DilatedSelfAttention(WIDTH, 2, Pattern.dilated((8,), (2,), is_causal=True))

    def forward(self, batch):
        x = self.embedding(batch["input_ids"])
        positions = sequence_context(self).positions_of(x)[:, None]
        return self.head(self.dense(x) + self.dilated(x) * (1 + positions) / 50)


class Nested(Double):
    def __init__(self):
        super().__init__()
        self.model = Inner(self.model).double()


class CrossAttention(Double):
    """torch's attention of the tokens to a memory that all ranks hold whole."""

    sequence_dims: ClassVar = {"memory": None}

    def __init__(self):
        super().__init__()
        self.model.blocks = nn.ModuleList([nn.MultiheadAttention(WIDTH, 2, batch_first=True).double()])

    def training_step(self, batch, batch_idx):
        x = self.model.embedding(batch["input_ids"])
        x = x + self.model.blocks[0](x, batch["memory"], batch["memory"])[0]
        loss = sequence_context(self).token_mean(*sums(self.model.head(x), batch["labels"]))
        self.losses.append(loss.item())
        return loss


class PlateauOfOneRank(Double):
    """A scheduler that goes by a number which each rank has of its own."""

    def training_step(self, batch, batch_idx):
        sign = 1 if self.global_rank else -1
        self.log("own", torch.tensor(float(sign * batch_idx)))
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "own", "interval": "step"},
        }


class PlateauOfAll(PlateauOfOneRank):
    def training_step(self, batch, batch_idx):
        loss = Double.training_step(self, batch, batch_idx)
        self.log("own", loss.detach().round(decimals=1))
        return loss


class RatesByOwnTokens(Double):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        for group in self.optimizers().param_groups:
            group["lr"] = 0.01 * float((batch["labels"] != -100).sum())


class ChangedInHook(Double):
    """The first tokens of what this rank holds lose their labels, and not those of the sequence."""

    def on_train_batch_start(self, batch, batch_idx):
        batch["labels"][:, :5] = -100


class ReplacedInHook(Double):
    def on_train_batch_start(self, batch, batch_idx):
        batch["labels"] = batch["labels"].roll(1, 1)


class ChangedBefore(Double):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        batch["labels"][:, :5] = -100
        return batch


class OwnAttentionInTest(Double):
    def test_step(self, batch, batch_idx):
        x = self.model.embedding(batch["input_ids"])
        x = F.scaled_dot_product_attention(x, x, x)
        loss = sequence_context(self).token_mean(*sums(self.model.head(x), batch["labels"]))
        self.log("loss", loss, batch_size=len(x))


class PlainMeanInTest(Double):
    def test_step(self, batch, batch_idx):
        loss = torch.divide(*sums(self.model(batch), batch["labels"]))
        self.log("loss", loss, batch_size=2, sync_dist=True)


class RightInTest(Double):
    def test_step(self, batch, batch_idx):
        loss = sequence_context(self).token_mean(*sums(self.model(batch), batch["labels"]))
        self.log("loss", loss, batch_size=2)


def extended_rows():
    generator = torch.Generator().manual_seed(1)
    for row in ROWS:
        weights = torch.rand(len(row["labels"]), generator=generator).double()
        memory = torch.rand(7, WIDTH, generator=generator).double()
        yield {**row, "weights": weights, "memory": memory}


class Kept(L.Callback):
    def on_train_end(self, trainer, module):
        self.parameters = {name: whole(x) for name, x in module.named_parameters()}


def ran(rank, world, kind, sharding, stage="fit"):
    """Return (losses, parameters, numbers that were logged, warnings of changed batches)."""
    from lightning_longnet.strategies import RingSequenceParallelStrategy

    module, kept = kind(), Kept()
    names = {*ROWS[0], *getattr(kind, "sequence_dims", {})}
    rows = [{name: x for name, x in row.items() if name in names} for row in extended_rows()]
    strategy = RingSequenceParallelStrategy(world, sharding, split_check="error", timeout=60)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trainer_of(strategy, world, callbacks=[kept], limit_train_batches=4)
        loader = DataLoader(rows, batch_size=2, collate_fn=collated)
        if stage == "test":
            trainer.test(module, loader, verbose=False)
        else:
            trainer.fit(module, loader)
    lines = [str(each.message) for each in caught if "changed between the split" in str(each.message)]
    numbers = {name: float(x) for name, x in trainer.callback_metrics.items()}
    return module.losses, getattr(kept, "parameters", {}), numbers, lines


def compared(trainers, kind, sharding, stage="fit"):
    """Compare two ranks with one process, and return the warnings of the first rank."""
    losses, parameters, numbers, lines = trainers.run(1, ran, kind, "ddp", stage)[0]
    assert not lines
    result = trainers.run(2, ran, kind, sharding, stage)
    for its_losses, its_parameters, its_numbers, _ in result:
        assert its_losses == pytest.approx(losses, rel=1e-10)
        assert its_numbers == pytest.approx(numbers, rel=1e-6)
        for name, x in parameters.items():
            torch.testing.assert_close(its_parameters[name], x, rtol=1e-10, atol=1e-10)
    return result[0][3]


CLIPPED = [ClippedByNorm, ClippedByValue, ClippedByOwnCode, ClippedByLightning]


@pytest.mark.parametrize("sharding", ["fsdp2", pytest.param("ddp", marks=pytest.mark.full)])
def test_gradients_may_be_changed_before_an_update_by_hand(trainers, sharding):
    for kind in CLIPPED:
        assert compared(trainers, kind, sharding) == [], kind


@pytest.mark.parametrize("sharding", ["ddp", pytest.param("fsdp2", marks=pytest.mark.full)])
def test_modules_of_users_are_as_in_one_process(trainers, sharding):
    for kind in (NormsAreLogged, Weighted, Nested, CrossAttention, PlateauOfAll, ChangedBefore):
        assert compared(trainers, kind, sharding) == [], kind


def refused(trainers, kind, sharding, stage="fit"):
    """Return the messages of both ranks, which end in errors."""
    outcomes = trainers.outcomes(2, ran, kind, sharding, stage)
    assert not any(is_result for is_result, _ in outcomes), kind
    return [value[1] for _, value in outcomes]


@pytest.mark.parametrize("sharding", ["fsdp2", pytest.param("ddp", marks=pytest.mark.full)])
def test_learning_rates_of_one_rank_are_refused(trainers, sharding):
    for kind in (PlateauOfOneRank, RatesByOwnTokens):
        for message in refused(trainers, kind, sharding):
            assert "the same learning rates, and those of rank 1 differ from those of rank 0: a scheduler" in message


def test_a_batch_that_changes_after_the_split_is_reported_once(trainers):
    for kind in (ChangedInHook, ReplacedInHook):
        _, _, _, lines = trainers.run(2, ran, kind, "ddp")[0]
        assert len(lines) == 1
        assert lines[0].startswith("labels of the batch changed between the split")


def test_the_first_test_batch_is_checked(trainers):
    for kind in (OwnAttentionInTest, PlainMeanInTest):
        for message in refused(trainers, kind, "fsdp2", "test"):
            assert "what is logged as loss on 2 ranks differs" in message
    assert compared(trainers, RightInTest, "fsdp2", "test") == []
