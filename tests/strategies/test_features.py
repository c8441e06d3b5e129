"""What a Trainer is used with: each gives what one process gives, or a run over one rank does."""

from functools import partial
from itertools import product

import pytest
import torch
from test_training import DOCUMENTS, FLOAT32, FLOAT64, MESHES, compare
from tiers import tiered
from torch import nn
from torch.nn.utils import clip_grad_value_
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler
from trained import (
    KeepParameters,
    Module,
    adamw,
    collated,
    fit,
    quiet,
    reference,
    samples,
    sgd,
    started,
    sums,
    trainer_of,
    whole,
)

from lightning_longnet import (
    SequenceContext,
    attach_context,
    keep_attention,
    sequence_context,
)
from lightning_longnet.strategies import RingSequenceParallelStrategy

PLAIN = {**FLOAT64, "dropout": 0.0, "accumulate": 1, "clip": None}


def run(rank, world, make, sharding="ddp", size=None, rows=None, strategy=None, **settings):
    """(losses, final parameters) after a fit of the module that `make` makes."""
    with quiet():
        torch.manual_seed(11)
        module = make()
        kept = KeepParameters()
        callbacks = [kept, *settings.pop("callbacks", [])]
        chosen = strategy or RingSequenceParallelStrategy(size or world, sharding)
        trainer = trainer_of(chosen, world, callbacks=callbacks, **{"limit_train_batches": 4, **settings})
        loader = DataLoader(rows or PLAIN["samples"], batch_size=4, collate_fn=collated, shuffle=True)
        trainer.fit(module, loader)
    return module.losses, kept.parameters


def double():
    return Module(started(PLAIN), adamw)


# Documents, exchanges and placements


PLACED = product(["contiguous", "zigzag"], ["auto", "gather", "ring", "swap"])


@pytest.mark.parametrize(("placement", "exchange"), tiered(PLACED, quick=[("zigzag", "ring")], long=[]))
def test_documents_by_any_exchange_and_placement(trainers, exchange, placement):
    expected = reference(DOCUMENTS)
    for result in trainers.run(2, fit_placed, DOCUMENTS, exchange, placement):
        compare(result, expected, 1e-9)


def fit_placed(rank, world, setting, exchange, placement):
    return fit(rank, world, setting, "ddp", world, exchange=exchange, placement=placement)


def fit_with_own_exchange(rank, world):
    """The exchanges that the layers' calls asked for, where one layer has its own."""
    from lightning_longnet.attention import op
    from lightning_longnet.attention.spec import AttentionSpec

    asked, call = [], op.forward
    op.forward = lambda *args: asked.append(AttentionSpec.loads(args[7]).exchange) or call(*args)
    try:
        model = started(PLAIN)
        model.blocks[1].attention.exchange = "ring"
        strategy = RingSequenceParallelStrategy(sharding="ddp", exchange="gather", split_check="off")
        run(rank, world, lambda: Module(model, adamw), strategy=strategy, limit_train_batches=1)
    finally:
        op.forward = call
    return asked


def test_a_layers_own_exchange_wins(trainers):
    assert trainers.run(2, fit_with_own_exchange) == [["gather", "ring"]] * 2


# Gradients


def reference_of_windows(setting, clip_value=None, by_tokens=True):
    """Micro-batches that count by their tokens are one large batch."""
    model = started(setting)
    attach_context(model, context := SequenceContext(seed=setting["seed"]))
    optimizer, rows = setting["optimizer"](model.parameters()), setting["samples"]
    order = list(DistributedSampler(rows, num_replicas=1, rank=0, seed=setting["seed"]))
    for first in range(0, setting["micro_batches"], setting["accumulate"]):
        parts = []
        for step in range(first, min(first + setting["accumulate"], setting["micro_batches"])):
            context.begin_step(step)
            batch = collated([rows[i] for i in order[step * 4 : step * 4 + 4]])
            parts.append(sums(model(batch), batch["labels"]))
        losses, counts = zip(*parts, strict=True)
        if by_tokens:
            (sum(losses) / sum(counts)).backward()
        else:
            (sum(x / n for x, n in parts) / len(parts)).backward()
        if clip_value:
            clip_grad_value_(model.parameters(), clip_value)
        if setting["clip"]:
            nn.utils.clip_grad_norm_(model.parameters(), setting["clip"])
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    ("sharding", "mesh"),
    tiered([("ddp", "1x2"), ("fsdp2", "2x2"), ("hsdp", "2x2")], quick=[], long=[("hsdp", "2x2")]),
)
def test_micro_batches_may_count_by_their_tokens(trainers, sharding, mesh):
    world, size = MESHES[mesh]
    for micro_batches in (4, 3):  # the last window of an epoch may be short
        setting = {**FLOAT64, "micro_batches": micro_batches}
        expected = reference_of_windows(setting)
        unlike = reference_of_windows(setting, by_tokens=False)
        for _, result in trainers.run(world, fit_by_tokens, setting, sharding, size):
            for name, x in result.items():
                torch.testing.assert_close(x, expected[name].detach(), rtol=1e-9, atol=1e-9)
            assert not torch.allclose(result["head.weight"], unlike["head.weight"], rtol=1e-6)


def fit_by_tokens(rank, world, setting, sharding, size):
    return fit(rank, world, setting, sharding, size, accumulate="tokens")


@pytest.mark.parametrize("sharding", tiered(["ddp", "fsdp2"], quick=[], full=["ddp"]))
def test_gradients_are_clipped_by_value(trainers, sharding):
    expected = reference_of_windows({**PLAIN, "optimizer": sgd, "seed": 0}, clip_value=1e-3)
    settings = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    for _, result in trainers.run(2, run_clipped, sharding, settings):
        for name, x in result.items():
            torch.testing.assert_close(x, expected[name].detach(), rtol=1e-9, atol=1e-9)


def run_clipped(rank, world, sharding, settings):
    return run(rank, world, lambda: Module(started(PLAIN), sgd), sharding, **settings)


# Precision


def run_precision(rank, world, sharding, precision):
    return run(rank, world, lambda: Module(started(FLOAT32), adamw), sharding, precision=precision)


PRECISIONS = product(["bf16-mixed", "bf16-true", "32-true"], ["ddp", "fsdp2", "deepspeed_stage_2"])


@pytest.mark.parametrize(
    ("precision", "sharding"),
    tiered(
        PRECISIONS,
        quick=[("bf16-mixed", "fsdp2")],
        long=[],
    ),
)
def test_half_precision_follows_the_full_one(trainers, deepspeed_trainers, sharding, precision):
    workers = deepspeed_trainers(2) if sharding.startswith("deepspeed") else trainers
    (expected, _) = trainers.run(1, run_precision, "ddp", "32-true")[0]
    for losses, parameters in workers.run(2, run_precision, sharding, precision):
        is_full = precision == "32-true"
        tolerance = 1e-5 if is_full else 3e-2
        assert losses == pytest.approx(expected, rel=tolerance)
        assert is_full or losses != expected
        if not sharding.startswith("deepspeed"):  # which keeps the optimiser's copy to itself
            half = precision == "bf16-true"
            assert {x.dtype for x in parameters.values()} == {torch.bfloat16 if half else torch.float32}


# Memory and compilation


class Checkpointed(Module):
    context_fn = None

    def __init__(self, *arguments):
        super().__init__(*arguments)
        options = {} if self.context_fn is None else {"context_fn": self.context_fn}
        for block in self.model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)


class KeptAttention(Checkpointed):
    context_fn = staticmethod(keep_attention)


def fit_checkpointed(rank, world, kind, sharding):
    import trained

    kept, trained.Module = trained.Module, kind
    try:
        return fit(rank, world, DOCUMENTS, sharding, world)
    finally:
        trained.Module = kept


@pytest.mark.parametrize(
    ("kind", "sharding"),
    tiered(product([Checkpointed, KeptAttention], ["ddp", "fsdp2"]), quick=[], long=[(KeptAttention, "fsdp2")]),
)
def test_activations_may_be_computed_again(trainers, kind, sharding):
    expected = reference(DOCUMENTS)
    for result in trainers.run(2, fit_checkpointed, kind, sharding):
        compare(result, expected, 1e-9)


class Compiled(Module):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        for i, block in enumerate(self.model.blocks):
            self.model.blocks[i] = torch.compile(block, backend="aot_eager")


def fit_compiled(rank, world, sharding):
    import warnings

    warnings.simplefilter("ignore")
    torch._dynamo.reset()
    losses, parameters = run(rank, world, lambda: Compiled(started(PLAIN), adamw), sharding)
    return losses, {name.replace("_orig_mod.", ""): x for name, x in parameters.items()}


@pytest.mark.parametrize("sharding", tiered(["ddp", "fsdp2"], quick=[], full=["ddp"]))
def test_blocks_may_be_compiled(trainers, sharding):
    expected = reference({**PLAIN, "seed": 0})
    for result in trainers.run(2, fit_compiled, sharding):
        compare(result, expected, 1e-9)


# Callbacks and ways of training


def run_averaged(rank, world, kind, sharding="ddp"):
    from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

    if kind == "ema":
        callback = EMAWeightAveraging(decay=0.5)
    else:
        callback = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    losses, _ = run(rank, world, double, sharding, callbacks=[callback], max_epochs=3)
    average = callback._average_model
    module = average.module if kind == "ema" else average
    return losses, {name: whole(x) for name, x in module.model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "sharding"),
    tiered(product(["ema", "swa"], ["ddp", "fsdp2", "hsdp"]), quick=[], long=[("swa", "fsdp2")]),
)
def test_weights_are_averaged(trainers, kind, sharding):
    expected = trainers.run(1, run_averaged, kind)[0]
    assert not all(torch.equal(x, y) for x, y in zip(expected[1].values(), started(PLAIN).parameters(), strict=True))
    for result in trainers.run(2, run_averaged, kind, sharding):
        compare(result, expected, 1e-9)


class Alternating(Module):
    """Two optimisers, stepped by hand, each for a part of the model."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        head = list(self.model.head.parameters())
        rest = [x for name, x in self.model.named_parameters() if not name.startswith("head")]
        return sgd(rest), sgd(head)


def run_by_hand(rank, world, sharding):
    return run(rank, world, lambda: Alternating(started(PLAIN), None), sharding)


@pytest.mark.parametrize("sharding", tiered(["ddp", "fsdp2"], quick=["fsdp2"]))
def test_two_optimisers_by_hand(trainers, sharding):
    expected = reference({**PLAIN, "optimizer": sgd, "seed": 0})
    for result in trainers.run(2, run_by_hand, sharding):
        compare(result, expected, 1e-9)


class Validated(Module):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.checked = []

    def validation_step(self, batch, batch_idx):
        loss = sequence_context(self).token_mean(*sums(self.model(batch), batch["labels"]))
        self.checked.append((self.trainer.sanity_checking, loss.item()))

    def val_dataloader(self):
        return DataLoader(samples(6, length=29), batch_size=2, collate_fn=collated)


def run_validated(rank, world, settings):
    with quiet():
        module = Validated(started(PLAIN), adamw)
        trainer = trainer_of(RingSequenceParallelStrategy(sharding="fsdp2"), world, **settings)
        trainer.fit(module, DataLoader(PLAIN["samples"], batch_size=4, collate_fn=collated))
    return len(module.losses), [is_sanity for is_sanity, _ in module.checked], [loss for _, loss in module.checked]


LIMITS = [
    ({"fast_dev_run": True}, 1, [False]),
    ({"limit_train_batches": 2, "limit_val_batches": 2, "num_sanity_val_steps": 1}, 2, [True, False, False]),
    ({"limit_train_batches": 4, "val_check_interval": 2, "limit_val_batches": 1}, 4, [True, False, False]),
    ({"max_steps": 3, "num_sanity_val_steps": 0}, 3, []),
]


@pytest.mark.parametrize(("settings", "steps", "checks"), tiered(LIMITS, quick=LIMITS[2:3], long=LIMITS[:1]))
def test_limits_and_checks(trainers, settings, steps, checks):
    result = trainers.run(2, run_validated, settings)
    assert result[0] == result[1]
    assert result[0][:2] == (steps, checks)
