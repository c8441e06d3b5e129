"""A rank waits as long as the place allows: minutes in a step, longer elsewhere, for collectives and for messages."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from pool import WORLDS
from tiers import tiered
from trained import Module, quiet, sgd, trainer_of

from lightning_longnet import Pattern
from lightning_longnet.attention.parallel.comm import Comm, MessageContext, timeout_of
from lightning_longnet.registration import NAMES
from lightning_longnet.strategies import RingSequenceParallelStrategy
from lightning_longnet.strategies.engines import strategy_class
from lightning_longnet.strategies.timeouts import Timeouts
from lightning_longnet.supervision.record import OUTSIDE

LONG, SHORT = 30.0, 0.5


def wait(group, kind):
    """The seconds that rank 0 waits for rank 1, which is late by two, its error, and the timeouts that groups had."""
    rank, limit = dist.get_rank(group), timedelta(seconds=LONG)
    own, kept = dist.new_group([0, 1], timeout=limit), dist.new_group([0, 1], timeout=limit)
    if rank > 1:
        return None
    x = torch.ones(3)
    dist.all_reduce(x, group=own)
    timeouts, seen = Timeouts(SHORT), []
    timeouts.kept = [kept]

    def look(each):
        seen.append(timeout_of(each).total_seconds())

    for _ in range(2):  # the micro-batches of the first step
        timeouts.shorten()
        look(own)
    timeouts.end_step()
    for _ in range(2):
        timeouts.shorten()
        look(own)
    look(kept)
    begin, error = time.monotonic(), ""
    if rank == 1:
        time.sleep(2.0)
    else:
        try:
            if kind == "collective":
                dist.all_reduce(x, group=own)
            else:
                Comm(own).exchange({}, {1: x}, MessageContext("a call", "kind"), "keys").wait()
        except RuntimeError as late:
            error = str(late)
    seconds = time.monotonic() - begin
    timeouts.end_step()
    look(own)
    timeouts.shorten()
    timeouts.interrupt()  # as a validation does
    timeouts.shorten()
    look(own)
    timeouts.interrupt()
    return seconds, error, seen


@pytest.mark.parametrize("kind", tiered(["collective", "message"], quick=["message"]))
def test_a_rank_gives_up_sooner_inside_of_a_step(pool, kind):
    seconds, error, seen = pool.run(max(WORLDS), wait, kind)[0]
    assert SHORT <= seconds < 1.9
    assert "Timed out" in error
    assert seen == [LONG, LONG, SHORT, SHORT, LONG, LONG, LONG]


@pytest.mark.parametrize("sharding", sorted(set(NAMES.values())))
@pytest.mark.parametrize("method", ["setup_environment", "load_checkpoint", "save_checkpoint"])
def test_every_engine_marks_where_ranks_wait_for_long(sharding, method):
    assert hasattr(getattr(strategy_class(sharding), method), "__wrapped__")


def phases_after_fit(rank, world, folder):
    """The phases after a run, and after a save, a save that fails and a load that follow it."""
    from lightning_longnet.models.longnet import LongNet, LongNetConfig

    pattern = Pattern.dilated((8, 64), (1, 2), is_causal=True)
    module = Module(LongNet(LongNetConfig(pattern, vocab_size=7, dim=8, layers=1, heads=2)), sgd)
    tokens, phases = torch.zeros(1, 4, dtype=torch.long), []
    with quiet():
        trainer = trainer_of(RingSequenceParallelStrategy(sharding="ddp"), world, max_steps=0)
        trainer.fit(module, [{"input_ids": tokens, "labels": tokens}])
        phases.append(trainer.strategy.progress.phase)
        trainer.save_checkpoint(f"{folder}/final.ckpt")
        phases.append(trainer.strategy.progress.phase)
        with pytest.raises(RuntimeError, match="is not saved"):
            trainer.save_checkpoint(f"{folder}/final.ckpt/inside.ckpt")
        phases.append(trainer.strategy.progress.phase)
        trainer.strategy.load_checkpoint(f"{folder}/final.ckpt")
        phases.append(trainer.strategy.progress.phase)
    return phases


def test_a_save_after_a_run_is_outside_of_it(trainers, tmp_path):
    assert trainers.run(1, phases_after_fit, str(tmp_path)) == [[OUTSIDE] * 4]
