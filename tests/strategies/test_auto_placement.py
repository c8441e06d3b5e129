"""`placement="auto"`: the placement that suits the layers of a module, on all ranks, and the losses of one process."""

import logging
import os
from contextlib import contextmanager

import lightning as L
import pytest
import torch
from decoder_runs import CONFIG, KeepLosses, module, rows
from tiers import tiered
from torch import nn
from torch.utils.data import DataLoader
from trained import collated, sums, trainer_of

from lightning_longnet import CausalLMModule, DilatedSelfAttention, Pattern, dilate, sequence_context
from lightning_longnet.huggingface.placements import attention_layers
from lightning_longnet.planning.job import Job

LENGTH = 96
DILATED = Pattern.dilated((8, 16), (1, 2), is_causal=True)
KINDS = {"dense": "zigzag", "dilated": "contiguous", "mixed": "zigzag", "own": "contiguous"}
KINDS |= {"made later": "zigzag", "asked early": "zigzag"}


class Own(L.LightningModule):
    """A module with a layer of this package, made at once or in `configure_model`."""

    def __init__(self, pattern, is_late=False, asks=False):
        super().__init__()
        self.pattern, self.is_late, self.asks, self.attention = pattern, is_late, asks, None
        self.embedding, self.head = nn.Embedding(61, 16), nn.Linear(16, 61)
        if not is_late:
            self.configure_model()

    def configure_model(self):
        if self.attention is None and (not self.is_late or self._trainer is not None):
            torch.manual_seed(2)
            self.attention = DilatedSelfAttention(16, 4, self.pattern).to(self.head.weight.dtype)

    def setup(self, stage):
        if self.asks:  # before the layer is made
            sequence_context(self).placement_of(LENGTH)

    def training_step(self, batch):
        x = self.embedding(batch["input_ids"])
        x = x + self.attention(x, documents=batch["documents"])
        return sequence_context(self).token_mean(*sums(self.head(x), batch["labels"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


def made(kind):
    torch.manual_seed(3)
    if kind == "own":
        return Own(DILATED).double()
    if kind in ("made later", "asked early"):
        return Own(Pattern.dense(is_causal=True), is_late=True, asks=kind == "asked early").double()
    net = module("float64", config={**CONFIG, "num_hidden_layers": 3}, learning_rate=0.3)
    if kind != "dense":
        dilate(net.model, DILATED, [0, 2] if kind == "mixed" else None)
    return net


@contextmanager
def logged():
    """Collect the lines that Lightning logs on rank 0."""
    lines, logger = [], logging.getLogger("lightning.pytorch.utilities.rank_zero")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def fit(rank, world, kind, sharding):
    """Return (losses, the kind of the placement, the lines about it)."""
    from lightning_longnet.strategies import RingSequenceParallelStrategy

    os.environ["PL_GLOBAL_SEED"] = "5"
    strategy = RingSequenceParallelStrategy(world, sharding)
    with logged() as lines:
        trainer = trainer_of(strategy, world, max_steps=2, callbacks=[kept := KeepLosses()])
        trainer.fit(made(kind), DataLoader(rows(8, LENGTH), 2, collate_fn=collated))
    placed = strategy.sequence_context.placement_of(LENGTH).kind
    return kept.losses, placed, [line for line in lines if "placement" in line]


@pytest.mark.parametrize("kind", tiered(KINDS, quick=["mixed"], full=["dense", "dilated", "own", "asked early"]))
def test_the_layers_choose_and_the_losses_are_those_of_one_process(trainers, kind):
    ((expected, alone, unlogged),) = trainers.run(1, fit, kind, "ddp")
    assert (alone, unlogged) == ("contiguous", [])  # of one rank, nothing is chosen
    results = trainers.run(2, fit, kind, "ddp")
    for losses, placed, _ in results:
        assert placed == KINDS[kind]
        assert losses == pytest.approx(expected, rel=1e-10)
    *others, line = results[0][2]
    assert len(others) == (kind == "asked early")
    assert line.startswith(f"RingSequenceParallelStrategy: placement {KINDS[kind]}: ")
    assert f"at {LENGTH} tokens the busiest of 2 ranks" in line


@pytest.mark.parametrize("kind", tiered(["mixed", "made later"], quick=[], full=["mixed"]))
def test_sharded_parameters_change_no_choice(trainers, kind):
    ((expected, *_),) = trainers.run(1, fit, kind, "ddp")
    for losses, placed, _ in trainers.run(2, fit, kind, "fsdp2"):
        assert placed == KINDS[kind]
        assert losses == pytest.approx(expected, rel=1e-10)


def test_a_plan_chooses_what_the_run_does():
    from lightning_longnet import LongNet, LongNetConfig
    from lightning_longnet.attention.parallel.placement_choice import placement_choice

    config = LongNetConfig([DILATED, Pattern.dense(is_causal=True), DILATED], dim=32, layers=3, heads=4, kv_heads=2)
    job = Job(config, tokens=LENGTH, per_node=2)
    expected = placement_choice(attention_layers(LongNet(config)), LENGTH, 2)
    assert job.placement_choice == expected
    assert job.placed().kind == expected.placement == "zigzag"
    assert Job(config, tokens=LENGTH, per_node=2, placement="contiguous").placed().kind == "contiguous"
    assert Job(config, tokens=LENGTH).placement_choice.placement == "contiguous"


def test_a_plan_of_a_decoder_has_the_patterns_of_its_dilated_layers():
    from lightning_longnet.huggingface.planned import planned_config

    net = CausalLMModule(config={**CONFIG, "num_hidden_layers": 3})
    dilate(net.model, DILATED, [0, 2])
    planned = planned_config(net.model.config, net.hparams)
    assert list(planned.patterns) == [DILATED, Pattern.dense(is_causal=True), DILATED]
    assert Job(planned, tokens=LENGTH, per_node=2).placement_choice.reason.endswith("2 of 3 layers are dilated")


def test_the_layers_of_both_packages_are_counted():
    net = CausalLMModule(config={**CONFIG, "num_hidden_layers": 3})
    dilate(net.model, DILATED, [1])
    holder = nn.ModuleDict({"decoder": net, "own": DilatedSelfAttention(16, 8, DILATED, num_kv_heads=2)})
    counted = {(layer.pattern, layer.heads, layer.kv_heads): many for layer, many in attention_layers(holder)}
    dense = Pattern.dense(is_causal=True)
    assert counted == {(dense, 4, 2): 2, (DILATED, 4, 2): 1, (DILATED, 8, 2): 1}
    net.model.set_attn_implementation("sdpa")  # whose layers are not split
    assert [layer.heads for layer, _ in attention_layers(holder)] == [8]
