"""What the set-up of a run costs until its first step, by counts of messages and of computations."""

from collections import Counter
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from faults import OurAttention
from test_first_batch import Module, rows
from tiers import tiered
from torch import nn
from trained import trainer_of

from lightning_longnet.sequence.buckets import in_buckets

STEPS = Counter()  # of the model of each run, those of copies among them


class Deep(OurAttention):
    depth = 1

    def build(self):
        super().build()
        self.deep = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(self.depth))

    def mixing(self, x):
        STEPS["training" if self.training else "validation"] += 1
        for each in self.deep:
            x = x + each(x)
        return super().mixing(x)


class Deeper(Deep):
    depth = 9


class Watched(Module):
    counts = None

    def on_train_batch_start(self, *_):
        self.counts = Counter(CALLS) if self.counts is None else self.counts


CALLS = Counter()


def counted(rank, world, sharding):
    """(messages, computations) of the model before the first training step, for models of two depths."""
    from lightning_longnet.strategies import RingSequenceParallelStrategy

    found = []
    for kind in (Deep, Deeper):
        CALLS.clear()
        STEPS.clear()
        with pytest.MonkeyPatch.context() as patches:
            for name in ("all_reduce", "broadcast"):
                patches.setattr(dist, name, counting(name, getattr(dist, name)))
            module = Watched(kind)
            strategy = RingSequenceParallelStrategy(2, sharding, split_check="error")  # which `make test` turns off
            trainer = trainer_of(strategy, world, max_steps=1, num_sanity_val_steps=1)
            trainer.fit(module, rows(), rows())
        found.append((dict(module.counts), dict(STEPS)))
    return found


def counting(name, function):
    def call(*arguments, **options):
        CALLS[name] += 1
        return function(*arguments, **options)

    return call


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sharding", tiered(["ddp", "fsdp2"], quick=["fsdp2"]))
def test_parameters_travel_together_and_an_equal_outcome_is_no_reason_to_compute_again(trainers, sharding):
    (small, large), other = trainers.run(2, counted, sharding)
    assert other == [small, large]
    assert small == large
    # whole sequences and parts in the check of each kind of batch, and the step itself
    assert small[1] == {"training": 2 + 1, "validation": 2 + 1}


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.int64, torch.bfloat16)])
def test_tensors_of_a_dtype_are_one_message(dtypes):
    tensors = [torch.arange(6 * i).reshape(2, 3, i).to(dtype) for i in (1, 0, 2) for dtype in dtypes]
    tensors.append(torch.ones(2, 3).t())  # no message may have strides
    expected = [2 * x for x in tensors]
    messages = []

    def double(message):
        messages.append(message)
        message *= 2

    in_buckets(double, tensors)
    assert [each.dtype for each in messages] == list(dtypes)
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(tensors, expected, strict=True))


def test_a_message_has_so_many_numbers_and_no_more():
    sizes = []
    with patch("lightning_longnet.sequence.buckets._NUMBERS", 10):
        tensors = [torch.zeros(n) for n in (4, 6, 1, 12, 3)]
        in_buckets(lambda message: sizes.append(message.numel()) or message.add_(1), tensors)
    assert sizes == [10, 1, 12, 3]
    assert all(bool((x == 1).all()) for x in tensors)
    strided = torch.zeros(3, 2).t()
    in_buckets(lambda message: message.add_(1), [strided])
    assert bool((strided == 1).all())
