"""Modules that know nothing of ranks, of any shape, and under stock strategies."""

import copy
import os

import pytest
import torch
from test_features import PLAIN, run
from test_training import COMBINED, DOCUMENTS, compare
from tiers import tiered
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, DistributedSampler
from trained import (
    PATTERN,
    VOCABULARY,
    WIDTH,
    Block,
    KeepParameters,
    Module,
    adamw,
    collated,
    quiet,
    reference,
    sgd,
    started,
    sums,
    trainer_of,
)

from lightning_longnet import (
    DilatedSelfAttention,
    MultiheadDilatedAttention,
    Pattern,
    SequenceContext,
    attach_context,
    sequence_context,
    sequence_mesh,
)


class Encoder(nn.Module):
    """Torch's own encoder with our attention in it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.0, batch_first=True)
        layer.self_attn = MultiheadDilatedAttention(WIDTH, 4, batch_first=True, pattern=Pattern.dense() + PATTERN)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, batch):
        x = self.embedding(batch["input_ids"])
        return self.head(self.encoder(x, src_key_padding_mask=batch["attention_mask"] == 0))


def encoder():
    torch.manual_seed(1)
    return Encoder().double()


def run_encoder(rank, world, sharding):
    from lightning_longnet.sequence import shards
    from lightning_longnet.strategies import RingSequenceParallelStrategy

    made, kind = [], shards.SequenceShard
    shards.SequenceShard = lambda *arguments: made.append(arguments) or kind(*arguments)
    try:
        strategy = RingSequenceParallelStrategy(world, sharding, split_check="off")  # which makes some, too
        return run(rank, world, lambda: Module(encoder(), adamw), strategy=strategy), len(made)
    finally:
        shards.SequenceShard = kind


@pytest.mark.parametrize("sharding", tiered(["ddp", "fsdp2"], quick=[], full=["ddp"]))
def test_torchs_own_encoder_trains_and_makes_one_shard_a_batch(trainers, sharding):
    model = encoder()
    optimizer, expected = adamw(model.parameters()), []
    for i in DistributedSampler(range(4), num_replicas=1, rank=0, shuffle=False):
        rows = PLAIN["samples"]
        order = list(DistributedSampler(rows, num_replicas=1, rank=0))
        batch = collated([rows[j] for j in order[4 * i : 4 * i + 4]])
        loss = torch.divide(*sums(model(batch), batch["labels"]))
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for (losses, parameters), shards in trainers.run(2, run_encoder, sharding):
        compare((losses, parameters), (expected, dict(model.state_dict())), 1e-9)
        assert shards == 4


def run_stock(rank, world):
    """Under Lightning's own strategies a context is there too, and its mean is that of all ranks."""
    with quiet():
        module = Module(started(PLAIN), adamw)
        trainer = trainer_of("ddp", world, limit_train_batches=4)
        kept = KeepParameters()
        trainer.callbacks.append(kept)
        trainer.fit(module, DataLoader(PLAIN["samples"], batch_size=4 // world, collate_fn=collated))
        context = sequence_context(module)
    x = torch.ones(2, 5, 3)
    assert (context.mesh, context.sequence_group, context.positions) == (None,) * 3
    with pytest.raises(ValueError, match=r"Call context\.attend"):
        _ = context.shard
    assert torch.equal(context.positions_of(x), torch.arange(5))
    assert context.gather_sequence(x) is x
    assert copy.deepcopy(context) is context
    return module.losses, kept.parameters


def test_a_module_runs_under_stock_strategies_as_it_is(trainers):
    expected = reference({**PLAIN, "seed": 0})
    for result in trainers.run(2, run_stock):
        compare(result, expected, 1e-9)
    assert COMBINED["dropout"] > 0  # which a stock strategy cannot keep the same, and so is left out here


class Flat(nn.Module):
    """Nothing in it is a list of blocks."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.attention = DilatedSelfAttention(WIDTH, 4, PATTERN)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, batch):
        return self.head(self.attention(self.embedding(batch["input_ids"])))


class InTurns(Module):
    """A forward, a backward and a step, twice in one training_step."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return sgd(self.model.parameters()), sgd(self.model.parameters())


def run_flat(rank, world, sharding):
    def make():
        torch.manual_seed(2)
        return InTurns(Flat().double(), None)

    return run(rank, world, make, sharding)


@pytest.mark.parametrize("sharding", tiered(["fsdp2", "hsdp"], quick=[], full=["hsdp"]))
def test_steps_in_turns_by_hand_without_blocks(trainers, sharding):
    losses, parameters = trainers.run(1, run_flat, "ddp")[0]
    assert losses[-1] < losses[0] - 0.01
    for result in trainers.run(2, run_flat, sharding):
        compare(result, (losses, parameters), 1e-9)


class Positioned(nn.Module):
    """A plain module that asks where it stands."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, WIDTH)

    def forward(self, x):
        return x + self.table(sequence_context(self).positions_of(x))


def positioned():
    torch.manual_seed(3)
    model = started(PLAIN)
    model.embedding = nn.Sequential(model.embedding, Positioned().double())
    return model


def run_positioned(rank, world):
    return run(rank, world, lambda: Module(positioned(), adamw))


def test_any_module_finds_the_context(trainers):
    expected = trainers.run(1, run_positioned)[0]
    for result in trainers.run(2, run_positioned):
        compare(result, expected, 1e-9)


class Shared(nn.Module):
    """A block that is called thrice, and a weight that a block shares with what is outside of it."""

    def __init__(self):
        super().__init__()
        block = Block(0.0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([block] * 3)
        self.head = nn.Sequential(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)))
        self.head[0][1].weight = self.embedding.weight

    def forward(self, batch):
        x = self.embedding(batch["input_ids"])
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def run_shared(rank, world, sharding):
    def make():
        torch.manual_seed(2)
        return Module(Shared().double(), adamw)

    return run(rank, world, make, sharding)


@pytest.mark.long
def test_blocks_and_weights_may_be_shared(trainers):
    expected = trainers.run(1, run_shared, "ddp")[0]
    for result in trainers.run(2, run_shared, "fsdp2"):
        compare(result, expected, 1e-9)


class Grouped(nn.Module):
    """Blocks are containers without a forward, which the model opens."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attention": Block(0.0), "mlp": nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.GELU()])})
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, batch):
        x = self.embedding(batch["input_ids"])
        for block in self.blocks:
            x = block["attention"](x)
            for layer in block["mlp"]:
                x = layer(x)
        return self.head(x)


def run_grouped(rank, world, sharding):
    units = []

    def make():
        torch.manual_seed(2)
        module = Module(Grouped().double(), adamw)
        units.append(module)
        return module

    result = run(rank, world, make, sharding)
    return result, [name for name, each in units[0].named_modules() if isinstance(each, FSDPModule)]


@pytest.mark.long
def test_containers_without_a_forward_are_opened(trainers):
    expected, _ = trainers.run(1, run_grouped, "ddp")[0]
    for result, units in trainers.run(2, run_grouped, "fsdp2"):
        compare(result, expected, 1e-9)
        assert units == ["", "model.blocks.0.attention", "model.blocks.1.attention"]


def run_inference(rank, world):
    """As on NCCL, where Lightning evaluates in inference mode, whose tensors count no changes."""
    with torch.inference_mode():
        model = started(DOCUMENTS).eval()
        context = SequenceContext(sequence_mesh_of(world))
        attach_context(model, context)
        batch = collated(DOCUMENTS["samples"][:2])
        out = context.gather_sequence(model(context.split(batch)))
        attach_context(model, None)
        return torch.allclose(out, model(batch), atol=1e-10)


def sequence_mesh_of(world):
    torch.distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=world)
    return sequence_mesh(world, timeout=60)


def test_inference_mode_takes_documents_and_padding(trainers):
    assert trainers.run(2, run_inference) == [True, True]
