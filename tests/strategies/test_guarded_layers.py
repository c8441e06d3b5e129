"""A `Guard` in runs of the strategy: kernels and memory before the first step, and advice for errors on all ranks."""

import logging
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from torch.utils.data import DataLoader
from trained import Module, collated, quiet, samples, sgd, started, trainer_of
from trainers import Trainers

from lightning_longnet import Guard
from lightning_longnet.attention import guard as guards
from lightning_longnet.attention.kernels import eager, sdpa
from lightning_longnet.strategies import RingSequenceParallelStrategy

NOTHING = {"preflights": 0, "replacements": 0, "refusals": 0, "failures": 0}


class Guarded(Module):
    """Its layers share a guard; a kernel of the last rank fails from a step on."""

    def __init__(self, guard=None, breaks=None):
        super().__init__(started({"dropout": 0.0, "dtype": torch.float32}), sgd)
        for block in self.model.blocks:
            block.attention.guard = guard
        self.guard, self.breaks, self.preflights = guard, breaks, []

    def training_step(self, batch, batch_idx):
        if self.breaks is not None and batch_idx == 1 and self.global_rank == self.trainer.world_size - 1:
            error = RuntimeError("DefaultCPUAllocator: can't allocate memory")
            self.patched = patch.object(sdpa, self.breaks, side_effect=error)
            self.patched.start()
        with patch.object(Guard, "preflight", autospec=True, side_effect=Guard.preflight) as preflight:
            loss = super().training_step(batch, batch_idx)
        self.preflights.append(preflight.call_count)
        return loss


def trained(rank, world, module, timeout=60):
    with quiet():
        trainer = trainer_of(RingSequenceParallelStrategy(timeout=timeout, split_check="off"), world, max_steps=3)
        trainer.fit(module, DataLoader(samples(6), batch_size=2, collate_fn=collated))


def with_a_broken_kernel(rank, world):
    """The losses with a kernel that fails on one rank before the first step, and without; what the guard did."""
    plain, module = Guarded(), Guarded(Guard())
    with patch.object(sdpa, "forward", eager.forward), patch.object(sdpa, "backward", eager.backward):
        trained(rank, world, plain)
    is_broken = rank == world - 1
    fails = patch.object(sdpa, "forward", side_effect=RuntimeError("no kernel image is available"))
    with fails if is_broken else nullcontext():
        trained(rank, world, module)
    return plain.losses, module.losses, module.preflights, module.guard.counts


@pytest.mark.long
def test_all_ranks_replace_a_kernel_before_the_first_step(trainers):
    for plain, losses, preflights, counts in trainers.run(2, with_a_broken_kernel):
        assert losses == pytest.approx(plain, rel=1e-5)
        assert preflights == [2, 0, 0]  # once for each layer, in the first step
        assert counts == NOTHING | {"preflights": 1, "replacements": 1}


def short_of_memory(rank, world):
    module = Guarded(Guard())
    free = patch.object(guards, "free_bytes", return_value=100 if rank == world - 1 else 2**40)
    with free, pytest.raises(ValueError, match=r"memory|free") as refused:
        trained(rank, world, module)
    return str(refused.value), module.preflights, module.guard.counts


def test_all_ranks_refuse_where_one_is_short_of_memory(trainers):
    for rank, (message, preflights, counts) in enumerate(trainers.run(2, short_of_memory)):
        expected = "results alone need" if rank else "another rank, 1, has too little memory"
        assert expected in message
        assert preflights == []
        assert counts == NOTHING | {"refusals": 1}


class Lines(logging.Handler):
    """The errors that the guard logs."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def failing_in_a_step(rank, world, breaks):
    module, log = Guarded(Guard(), breaks), Lines()
    guards.logger.addHandler(log)
    try:
        with pytest.raises(RuntimeError) as raised:
            trained(rank, world, module, timeout=6)
    finally:
        guards.logger.removeHandler(log)
        if rank == world - 1:
            module.patched.stop()
    return str(raised.value), raised.value.__notes__, module.guard.counts, log.lines


@pytest.mark.long
@pytest.mark.parametrize("breaks", [pytest.param("forward", marks=pytest.mark.full), "backward"])
def test_an_error_in_a_step_carries_advice_on_all_ranks(breaks):
    own = Trainers(2)  # gloo's threads never rest again once a peer has given up
    try:
        (_, waited, counts, lines), (error, failed, own_counts, own_lines) = own.run(2, failing_in_a_step, breaks)
    finally:
        own.close(kill=True)
    assert error == "DefaultCPUAllocator: can't allocate memory"
    memory = "Memory is short: share each sequence among more ranks"
    assert failed[0].startswith(memory)
    assert waited[0] == "Another rank has ended or does something else: the first error among the ranks says why."
    assert "because another rank failed first: rank 1 of 2" in waited[1]
    assert f"can't allocate memory. {memory}" in waited[1]
    assert counts == own_counts == NOTHING | {"preflights": 1, "failures": 1}
    assert [len(lines), len(own_lines)] == [1, 1]
    assert own_lines[0].startswith("rank 1 of 2, ")
    assert f"can't allocate memory; {memory}" in own_lines[0]
