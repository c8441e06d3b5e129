"""A step on a GPU without work of the host: the operators run on a device that holds no data, kernels left out.

A steady step copies nothing from the host to the device, and waits for no result of it.  The device is torch's "meta",
which stands for any that is not the CPU: to read a value of it raises an error.
"""

from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from tiers import tiered
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_longnet import Pattern
from lightning_longnet.attention import op
from lightning_longnet.attention.kernels import BLOCK_KERNELS
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.parallel.rank_blocks import rank_blocks
from lightning_longnet.attention.parallel.shard import SequenceShard
from lightning_longnet.attention.plan import blocks, packed
from lightning_longnet.attention.spec import AttentionSpec
from lightning_longnet.planning.fake_rank import FakeComm, PlannedShard

PATTERN = Pattern.dilated((64, 256, 512), (1, 2, 4), is_causal=True)
DEVICE = torch.device("meta")


class Watched(TorchDispatchMode):
    """Counts copies from the host to the device, and waits for the device."""

    def __init__(self):
        super().__init__()
        self.copies, self.waits = Counter(), Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        out = operator(*args, **(kwargs or {}))
        read, made = ([x for x in tree_leaves(each) if isinstance(x, torch.Tensor)] for each in ((args, kwargs), out))
        on_device = [x.device.type == "meta" for x in (*read, *made)]
        # a number in a tensor is an argument of a kernel, and not copied; but copy_() copies it
        on_host = [x.device.type == "cpu" and (x.dim() or name == "copy_") for x in read]
        if any(on_device) and any(on_host):
            self.copies[name] += 1
        if any(x.device.type == "meta" for x in read) and (
            name in ("_local_scalar_dense", "nonzero", "equal", "unique_consecutive", "_unique2")
            or any(x.device.type == "cpu" for x in made)
        ):
            self.waits[name] += 1
        return out


class Stub:
    """A kernel that computes nothing."""

    takes_weights = staticmethod(lambda device: False)

    @staticmethod
    def forward(q, k, v, call):
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)

    @staticmethod
    def backward(grad, q, k, v, out, lse, call):
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class Sent:
    """Messages that have arrived."""

    def wait(self):
        pass


class Comm(FakeComm):
    """A rank whose messages arrive at once, with anything in them."""

    name = None

    def exchange(self, send, receive, context, content):
        self.traffic.messages += len(send)
        assert all(x.device == DEVICE or x.device.type == "cpu" for x in (*send.values(), *receive.values()))
        return Sent()


class Shard(PlannedShard):
    """A rank that runs attention, and does not only know its memory."""

    def __init__(self, placement, rank):
        super().__init__(placement, rank, {})
        self.comm = Comm(rank, placement.ranks)
        self.threads, self.calls, self.saves_inputs_of, self.key_padding_mask = 1, 1, {}, None

    saves_inputs = SequenceShard.saves_inputs


@contextmanager
def without_kernels():
    with patch.dict(BLOCK_KERNELS, sdpa=Stub):
        yield
    # what was kept on the device has no data
    blocks.plan.cache_clear()
    rank_blocks.cache_clear()
    packed._KEPT.clear()


def run(tensors, spec, documents, number):
    q, k, v = tensors
    masks = None, documents, None, None
    out, lse, saved = op.forward.body(q, k, v, *masks, spec, number)
    op.backward.body(torch.empty_like(out), q, k, v, out, lse, saved, *masks, spec, number)


def steady_step(length, exchange="auto", shard=None, documents=None):
    """What is counted in the third step of a layout on the device."""
    spec = AttentionSpec(PATTERN, "sdpa", exchange=exchange).dumps()
    number = None if shard is None else shard.number
    with without_kernels():
        tensors = torch.randn(3, 1 if documents is None else len(documents), length, 8, 16).unbind()
        run(tensors, spec, documents, number)  # on the CPU, where numbers of rows are counted
        if shard is not None:
            for key, value in shard._cache.items():
                if key[0] == "route":
                    assert all(round_._counts for round_ in value.rounds)
        known = None if documents is None else packed.packed_rows(documents).rows
        tensors = [torch.empty(x.shape, device=DEVICE) for x in tensors]
        documents = None if documents is None else documents.to(DEVICE)
        with patch.object(packed, "document_cuts", side_effect=[known]):  # the only read, once for a tensor
            for _ in range(3):
                with Watched() as watched:
                    run(tensors, spec, documents, number)
    return watched


def test_whole_sequences():
    result = steady_step(1024)
    assert (result.copies, result.waits) == ({}, {})


def test_packed_rows():
    ids = torch.stack([torch.arange(256) // n for n in (256, 50, 33)])
    result = steady_step(256, documents=ids)
    assert (result.copies, result.waits) == ({}, {})


@pytest.mark.parametrize("exchange", ["gather", "ring", "swap"])
@pytest.mark.parametrize("placement", tiered(["contiguous", "zigzag"], quick=["zigzag"]))
def test_parts_of_sequences(exchange, placement):
    shard = Shard(Placement((100, 128, 140, 144), placement), 2)
    result = steady_step(140, exchange, shard)
    assert (result.copies, result.waits) == ({}, {})
    assert shard.comm.traffic.messages > 0
