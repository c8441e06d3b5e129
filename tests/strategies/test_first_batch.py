"""The split check of a strategy: a wrong module ends before its first step, whatever the engine, and says where."""

import inspect
import logging
import os
import threading
import warnings

import lightning as L
import pytest
import torch
from faults import VOCABULARY, Base, Convolution, Cumulative, OurAttention, PlainMean
from tiers import tiered
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, SumMetric
from trained import SMALL_BUCKETS, trainer_of

from lightning_longnet import LongViTConfig, LongViTModule, Pattern, sequence_context
from lightning_longnet.split_check import SplitMismatch

ENGINES = ["ddp", "fsdp2", "hsdp"]


class Module(L.LightningModule):
    def __init__(self, kind, manual=False):
        super().__init__()
        self.model, self.automatic_optimization = kind(), not manual
        self.steps, self.numbers = 0, []

    def training_step(self, batch, batch_idx):
        assert sequence_context(self) is self.trainer.strategy.sequence_context
        self.steps += 1
        loss = self.model.step(batch)
        self.log("loss", loss, sync_dist=True)
        self.logger.log_metrics({"loss": float(loss)}) if self.logger else None
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        raise_if_copied(self)
        return None

    def validation_step(self, batch, batch_idx):
        self.log("val", self.model.step(batch), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def raise_if_copied(module):
    assert module is module.trainer.lightning_module, "the check went on behind the first update"


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def rows():
    ids = torch.randint(VOCABULARY, (4, 65), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    return DataLoader([{name: x[i] for name, x in batch.items()} for i in range(4)], batch_size=2)


def fit(rank, world, kind, sharding, manual=False, validates=False, module=None, loader=None, resume=None, **options):
    """(steps of the module, lines of the log that speak of the check)"""
    from lightning_longnet.strategies import RingSequenceParallelStrategy

    options = {"split_check": "error", **options}  # the default, which `make test` turns off
    if sharding.startswith("deepspeed"):
        options = {"engine": SMALL_BUCKETS, **options}
    torch.manual_seed(rank)
    module = Module(kind, manual) if module is None else module()
    lines = Lines()
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)  # which other tests raise
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        try:
            trainer = trainer_of(
                RingSequenceParallelStrategy(2, sharding, **options),
                world,
                max_steps=2,
                num_sanity_val_steps=int(validates),
            )
            data = rows() if loader is None else loader()
            trainer.fit(module, data, data if validates else None)
        finally:
            logger.removeHandler(lines)
    spoken = [line for line in lines.lines if line.startswith("split check")]
    spoken += [str(each.message) for each in raised if "parts of sequences" in str(each.message)]
    return getattr(module, "steps", None), spoken


def test_the_check_is_on_by_default():
    from lightning_longnet.strategies import RingSequenceParallelStrategy

    assert inspect.signature(RingSequenceParallelStrategy).parameters["split_check"].default == "error"
    assert RingSequenceParallelStrategy()._first_batches.action == "error"


@pytest.mark.parametrize("sharding", tiered(ENGINES, quick=["fsdp2"], full=["ddp"]))
def test_a_right_module_is_said_to_be(trainers, sharding):
    (steps, lines), _ = trainers.run(2, fit, OurAttention, sharding)
    assert steps == 2  # those of the copies are not counted
    assert len(lines) == 1
    assert lines[0].startswith("split check of training: checked at 63 tokens: 2 ranks equal one process, to ")


@pytest.mark.parametrize("sharding", tiered(ENGINES, quick=["ddp"], full=["hsdp"]))
def test_a_wrong_module_ends_before_its_first_step(trainers, sharding):
    for is_result, value in trainers.outcomes(2, fit, Cumulative, sharding):
        assert not is_result
        kind, message, _ = value
        assert kind is SplitMismatch
        assert "model.history (Functional) is the first" in message


@pytest.mark.parametrize(
    "sharding", tiered(["deepspeed_stage_2", "deepspeed_stage_3"], quick=[], full=["deepspeed_stage_2"])
)
def test_under_deepspeed(deepspeed_trainers, sharding):
    workers = deepspeed_trainers(2)
    (steps, lines), _ = workers.run(2, fit, OurAttention, sharding)
    assert steps == 2
    assert "2 ranks equal one process" in lines[0]
    for is_result, value in workers.outcomes(2, fit, PlainMean, sharding):
        assert not is_result
        assert "a mean over the tokens of this rank alone" in value[1]


@pytest.mark.long
def test_manual_optimisation_is_checked_up_to_an_error_after_an_update(trainers):
    (steps, lines), _ = trainers.run(2, fit, OurAttention, "ddp", True)
    assert steps == 2
    assert "2 ranks equal one process" in lines[0]
    assert not any(is_result for is_result, _ in trainers.outcomes(2, fit, Convolution, "ddp", True))


class WrongInValidation(Base):
    def mixing(self, x):
        return x if self.training else x.cumsum(1)


@pytest.mark.long
def test_validation_is_checked_on_its_own(trainers):
    (_, lines), _ = trainers.run(2, fit, OurAttention, "fsdp2", False, True)
    assert [line.partition(":")[0] for line in lines] == ["split check of validation", "split check of training"]
    for is_result, value in trainers.outcomes(2, fit, WrongInValidation, "fsdp2", False, True):
        assert not is_result
        assert "what is logged as val on 2 ranks differs" in value[1]


def warned(rank, world, action):
    return fit(rank, world, PlainMean, "ddp", split_check=action)


@pytest.mark.long
def test_it_warns_or_stays_silent_where_that_is_asked_for(trainers):
    (steps, lines), (_, other) = trainers.run(2, warned, "warn")
    assert steps == 2
    assert len(lines) == 1
    assert "the step itself is the first" in lines[0]
    assert other == []
    assert trainers.run(2, warned, "off") == [(2, []), (2, [])]


class Adversarial(Module):
    """Two optimizers, the real one as well, and changes of the Trainer."""

    def __init__(self):
        super().__init__(OurAttention, manual=True)
        self.critic = Cumulative()

    def training_step(self, batch, batch_idx):
        self.steps += 1
        self.trainer.should_stop, self.trainer.note = self.steps > 5, "text"
        first, second = self.optimizers()
        for optimizer, model in ((first, self.model), (second, self.critic)):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            loss = model.step(batch)
            self.manual_backward(loss, retain_graph=True)
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [torch.optim.SGD(each.parameters(), lr=0.1) for each in (self.model, self.critic)]


def of_two(rank, world, sharding):
    return fit(rank, world, None, sharding, module=Adversarial)


@pytest.mark.long
def test_the_second_of_two_optimizers_is_checked_as_well(trainers):
    for is_result, value in trainers.outcomes(2, of_two, "ddp"):
        assert not is_result
        assert "critic.history (Functional) is the first" in value[1]


class Reaching(Module):
    """A step that reaches for the Trainer, its module and its optimizers."""

    def __init__(self):
        super().__init__(OurAttention)

    def training_step(self, batch, batch_idx):
        loss, trainer = super().training_step(batch, batch_idx), self.trainer
        if self is not trainer.lightning_module:  # a copy
            trainer.should_stop, trainer.note = True, "text"
            trainer.save_checkpoint("/proc/of/no/process")
            trainer.lightning_module.model.head.bias.sum().backward()
            trainer.optimizers[0].step()
        return loss


def of_reaching(rank, world):
    before = []

    class Noting(Reaching):
        def on_train_batch_start(self, batch, batch_idx):
            trainer, bias = self.trainer, self.model.head.bias
            before.append((bias.grad is None, trainer.should_stop, hasattr(trainer, "note")))

    steps, lines = fit(rank, world, None, "ddp", module=Noting)
    return steps, lines, before


@pytest.mark.long
def test_a_step_that_reaches_for_the_trainer_changes_nothing(trainers):
    for steps, lines, before in trainers.run(2, of_reaching):
        assert steps == 2
        assert not lines or "returns and logs no number" in lines[0]
        assert before[0] == (True, False, False)


class Validated(Module):
    """Sums, extremes and metrics that are logged, in one of several loaders."""

    def __init__(self, counts_once=True):
        super().__init__(OurAttention)
        self.right, self.samples = MeanMetric(), SumMetric()
        self.counts_once = counts_once

    def setup(self, stage):
        if self.counts_once:
            sequence_context(self).per_sample(self.samples)

    def validation_step(self, batch, batch_idx, dataloader_idx):
        logits = self.model.logits(batch)
        self.log("tokens", float(batch["labels"].numel()), reduce_fx="sum", sync_dist=True)
        self.right.update((logits.argmax(-1) == batch["labels"]).double())
        self.samples.update(len(logits))
        self.log_dict({"right": self.right, "samples": self.samples})
        self.log("top", logits.max(), reduce_fx="max", sync_dist=True)
        self.log_dict(dictionary={"val": self.model.step(batch)}, sync_dist=True)


def of_validated(rank, world, counts_once):
    from lightning_longnet.strategies import RingSequenceParallelStrategy

    lines, logger = Lines(), logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(lines)
    trainer = trainer_of(RingSequenceParallelStrategy(2, "fsdp2", split_check="error"), world)
    trainer.validate(Validated(counts_once), [rows(), rows()], verbose=False)
    logger.removeHandler(lines)
    return [line for line in lines.lines if line.startswith("split check")]


def test_sums_extremes_and_metrics_that_are_logged_are_right(trainers):
    lines, _ = trainers.run(2, of_validated, True)
    assert lines[0].startswith("split check of validation: checked at 63 tokens: 2 ranks equal one process")


@pytest.mark.long
def test_a_metric_that_counts_each_sample_on_all_ranks_is_found(trainers):
    for is_result, value in trainers.outcomes(2, of_validated, False):
        assert not is_result
        assert "what is logged as samples on 2 ranks differs by 100.0%" in value[1]


class HeldByFirst(Module):
    def __init__(self):
        super().__init__(OurAttention)
        self.writer = threading.Lock() if os.environ["LOCAL_RANK"] == "0" else None


def of_held(rank, world):
    return fit(rank, world, None, "fsdp2", module=HeldByFirst)


@pytest.mark.long
def test_a_module_that_one_rank_alone_cannot_copy(trainers):
    (steps, lines), _ = trainers.run(2, of_held)
    assert steps == 2
    assert "2 ranks equal one process" in lines[0]
    assert "ran inside of the engine, and finds less than one on copies, as the module cannot be copied" in lines[0]


def images():
    config = LongViTConfig(
        pattern=Pattern.dilated((4, 16), (1, 2)), image_size=8, patch_size=2, dim=16, layers=1, heads=2, classes=3
    )
    return LongViTModule(config, learning_rate=0.01)


def pictures():
    torch.manual_seed(0)
    return DataLoader([{"pixels": torch.randn(3, 8, 8), "label": i % 3} for i in range(4)], batch_size=2)


def of_images(rank, world):
    return fit(rank, world, None, "ddp", module=images, loader=pictures)


@pytest.mark.long
def test_models_that_make_their_sequences_are_checked_whole(trainers):
    (_, lines), _ = trainers.run(2, of_images)
    assert lines[0].startswith("split check of training: checked: 2 ranks equal one process")
