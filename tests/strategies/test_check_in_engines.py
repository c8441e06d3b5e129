"""The split check of modules that cannot be copied: it runs inside of the engine, and says that it finds less there."""

import threading

import pytest
import torch
from faults import Base, OurAttention, OwnAttention
from test_first_batch import Module, fit
from tiers import tiered
from torch import nn

from lightning_longnet import sequence_context
from lightning_longnet.split_check import SplitMismatch
from lightning_longnet.split_check.engine import EngineModule

WEAKER = "This check ran inside of the engine, and finds less than one on copies, as "


class Kept(nn.Module):
    """A module with a state of each kind that a step changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.history, self.total = [], torch.zeros(())

    def forward(self, x):
        self.steps += 1
        self.total += 1
        self.history.append(len(x))
        return x


class Sharded(Module):
    """A module that exists only sharded: `configure_model` makes it, on the meta device under fsdp2."""

    kind = OurAttention

    def __init__(self):
        super().__init__(nn.Identity)

    def configure_model(self):
        from lightning.pytorch.strategies import ModelParallelStrategy
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        if isinstance(self.model, nn.Identity):
            if not isinstance(self.trainer.strategy, ModelParallelStrategy):
                import deepspeed

                torch.manual_seed(1)
                with deepspeed.zero.Init(config_dict_or_path=self.trainer.strategy.config):
                    self.model = self.kind()
                return
            with torch.device("meta"):
                self.model = self.kind()
            fully_shard(self.model, mesh=self.device_mesh._flatten("all_ranks"))
            register_fsdp_forward_method(self.model, "step")
            self.model.to_empty(device="cpu")
            torch.manual_seed(1)
            for parameter in self.model.parameters():
                nn.init.normal_(parameter, std=0.5)
            self.kept = Kept()

    def training_step(self, batch, batch_idx):
        if "kept" in self._modules:
            self.kept(batch["input_ids"])
        return super().training_step(batch, batch_idx)


class ShardedFault(Sharded):
    kind = OwnAttention


class ShardedPlain(Sharded):
    kind = Base


class DetachedParts(OurAttention):
    """The loss is right, and the gradient is not."""

    def mixing(self, x):
        context = sequence_context(self)
        size = context.length if context.is_split else x.shape[1]
        total = torch.cat([context.gather_sequence(x)], 1).detach().sum(1, keepdim=True) / size
        own = x.sum(1, keepdim=True) / size
        return super().mixing(x) + total + own - own.detach()


class ShardedGradient(Sharded):
    kind = DetachedParts


class EvenLengths(torch.autograd.Function):
    """The identity, whose backward refuses an odd length."""

    @staticmethod
    def forward(ctx, x):
        ctx.tokens = x.shape[1]
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.tokens % 2:
            raise RuntimeError("the length must be even")
        return grad


class EvenAttention(OurAttention):
    def mixing(self, x):
        return super().mixing(EvenLengths.apply(x))


class ShardedEven(Sharded):
    kind = EvenAttention

    def on_train_end(self):
        self.trained = [parameter.full_tensor().detach() for parameter in self.model.parameters()]


class Locked(Module):
    def __init__(self, kind=OurAttention):
        super().__init__(kind)
        self.lock = threading.Lock()


class LockedFault(Locked):
    def __init__(self):
        super().__init__(OwnAttention)


def checked(rank, world, module, sharding):
    made = []

    def build():
        made.append(module())
        return made[0]

    steps, lines = fit(rank, world, None, sharding, module=build)
    kept = getattr(made[0], "kept", None)
    return steps, lines, None if kept is None else (float(kept.steps), kept.history, float(kept.total))


@pytest.mark.parametrize(
    ("module", "sharding"),
    tiered([(Sharded, "fsdp2"), (Locked, "ddp"), (Locked, "fsdp2")], quick=[(Locked, "ddp")], full=[(Locked, "fsdp2")]),
)
def test_a_right_module_is_checked_in_its_engine_and_left_as_it_was(trainers, module, sharding):
    reason = "cannot be copied: " + ("its parameters are sharded" if module is Sharded else "cannot pickle")
    for steps, lines, kept in trainers.run(2, checked, module, sharding):
        assert steps == 2
        assert kept == (None if module is Locked else (2, [2, 2], 2))
        if lines:
            (line,) = lines
            assert line.startswith("split check of training: checked at 63 tokens: 2 ranks equal one process, to ")
            assert f"{WEAKER}the module {reason}" in line


class ShardedUnused(Sharded):
    """A module with a part that FSDP2 shards on its own, and that no step calls."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        super().configure_model()
        self.unused = fully_shard(nn.Linear(4, 4), mesh=self.device_mesh._flatten("every_rank"))


@pytest.mark.parametrize("module", tiered([Sharded, ShardedUnused], quick=[], full=[Sharded]))
def test_training_is_checked_after_a_validation_that_left_parameters_gathered(trainers, module):
    for steps, lines in trainers.run(2, fit, None, "fsdp2", False, True, module):
        assert steps == 2
        if lines:
            assert [line.partition(":")[0] for line in lines] == [
                "split check of validation",
                "split check of training",
            ]
            assert all("2 ranks equal one process" in line for line in lines)


@pytest.mark.parametrize(
    ("module", "sharding"),
    tiered(
        [(ShardedFault, "fsdp2"), (LockedFault, "ddp"), (LockedFault, "fsdp2")],
        quick=[(ShardedFault, "fsdp2")],
        full=[(LockedFault, "fsdp2")],
    ),
)
def test_a_wrong_module_is_found_in_its_engine(trainers, module, sharding):
    for is_result, value in trainers.outcomes(2, checked, module, sharding):
        assert not is_result
        assert value[0] is SplitMismatch
        assert "model.attention (Mixer) is the first that gets the same" in value[1]
        assert WEAKER in value[1]


@pytest.mark.long
def test_a_gradient_that_differs_is_found_under_fsdp2(trainers):
    for is_result, value in trainers.outcomes(2, checked, ShardedGradient, "fsdp2"):
        assert not is_result
        assert "the gradient of model." in value[1]
        assert WEAKER in value[1]


def trained(rank, world, split_check):
    made = []

    def build():
        made.append(ShardedEven())
        return made[0]

    fit(rank, world, None, "fsdp2", module=build, split_check=split_check)
    return made[0].trained


@pytest.mark.full
def test_a_check_whose_backward_raises_leaves_fsdp2_able_to_train(trainers):
    """FSDP2 is left in the middle of a step by the error, and would give no gradients to later ones."""
    for unchecked, checked in zip(trainers.run(2, trained, "off"), trainers.run(2, trained, "error"), strict=True):
        assert all(map(torch.equal, unchecked, checked))


def test_an_attribute_of_two_modules_is_one_copy_inside_of_an_engine():
    net = nn.ModuleList([nn.Identity(), nn.Identity()])
    history, total = [1], torch.zeros(())
    for each in net:
        each.history, each.total = history, total
    with EngineModule(net, None, (), has_gradients=True).lent({}, {}, None):
        net[0].history.append(2)
        net[0].total += 1
        assert net[1].history == [1, 2]
        assert net[1].total == 1
    assert net[0].history is net[1].history is history
    assert (history, total) == ([1], 0)


@pytest.mark.long
def test_modules_that_deepspeed_shards_when_it_makes_them(deepspeed_trainers):
    workers = deepspeed_trainers(2)
    (steps, lines, _), _ = workers.run(2, checked, ShardedPlain, "deepspeed_stage_3")
    assert steps == 2
    assert "2 ranks equal one process" in lines[0]
    assert WEAKER in lines[0]
    for is_result, value in workers.outcomes(2, checked, ShardedFault, "deepspeed_stage_3"):
        assert not is_result
        assert "model.attention (Mixer) is the first" in value[1]
