"""Signals: one checkpoint of all ranks, exit status 143, and losses that go on as if nothing had been."""

import logging
from itertools import product
from signal import SIGTERM

import pytest
import torch
from interrupted import SETTING, Run
from tiers import tiered
from torch.utils.data import DataLoader
from trained import Module, collated, quiet, samples, started, trainer_of

STEPS = {"accumulate_grad_batches": 2, "val_check_interval": 2}
# who is told, where: a micro-batch of training, or a step of the optimizer while it validates or saves
WHERE = {
    "one rank": {1: {("training", 3): SIGTERM}},
    "rank 0": {0: {("training", 3): SIGTERM}},
    "all ranks": {0: {("training", 3): SIGTERM}, 1: {("training", 3): SIGTERM}},
}
WHILE = {
    "before training": ({0: {("start", 0): SIGTERM}}, 1),
    "in the middle of accumulating": ({1: {("training", 5): SIGTERM}}, 4),
    "at the end of an epoch": ({1: {("training", 4): SIGTERM}}, 3),
    "twice, and while it saves": ({0: {("training", 2): SIGTERM, ("saving", 2): SIGTERM}}, 2),
    "in a validation": ({1: {("validation", 1): SIGTERM}}, 1),
    "after the last step": ({0: {("epoch", 6): SIGTERM}}, 6),
    "in the last step": ({1: {("training", 9): SIGTERM}}, 6),
}


@pytest.fixture(scope="module")
def undisturbed(trainers, tmp_path_factory):
    made = {}

    def losses(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            ((made[kind], code, names), *_) = trainers.run(2, Run(str(folder), kind, 2, **STEPS))
            assert (code, names) == (None, [])
        return made[kind]

    return losses


def stop_and_go_on(trainers, folder, kind, signals, step, right):
    stopped = trainers.run(2, Run(str(folder), kind, 2, signals=signals, **STEPS))
    for losses, code, names in stopped:
        assert code == 143
        assert names == [f"preemption-step={step}.ckpt"]
        assert losses == stopped[0][0]
    resume = str(folder / names[0])
    for rest, code, _ in trainers.run(2, Run(str(folder), kind, 2, resume=resume, **STEPS)):
        assert code is None
        assert not set(rest) & set(losses)
        result = {**losses, **rest}
        assert sorted(result) == sorted(right)
        for number, loss in right.items():
            torch.testing.assert_close(result[number], loss, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("kind", "signalled"),
    tiered(product(["ddp", "fsdp2"], WHERE), quick=[("fsdp2", "one rank")], long=[]),
)
def test_whichever_rank_is_signalled_all_stop(trainers, undisturbed, tmp_path, kind, signalled):
    stop_and_go_on(trainers, tmp_path, kind, WHERE[signalled], 2, undisturbed(kind))


def rare(folder):
    from lightning_longnet.callbacks import Preemption

    return [Preemption(every_n_steps=3, dirpath=f"{folder}/elsewhere")]


@pytest.mark.long
def test_a_stock_strategy_and_fewer_looks(trainers, tmp_path):
    signalled = {"signals": WHERE["one rank"], "callbacks": rare, "limit_val_batches": 0}
    for losses, code, _ in trainers.run(2, Run(str(tmp_path), "stock ddp", 2, **signalled)):
        assert code == 143
        assert sorted(losses) == [0, 1, 2, 3, 4]
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["preemption-step=3.ckpt"]


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def callbacks_of_two_fits(rank, world, preemption, own):
    """The callbacks of each fit that are a Preemption, and what the log says of it."""
    from lightning_longnet.callbacks import Preemption
    from lightning_longnet.strategies import RingSequenceParallelStrategy

    logger, heard, counts = logging.getLogger("lightning.pytorch.utilities.rank_zero"), Heard(), []
    with quiet():
        level = logger.level
        logger.addHandler(heard)
        logger.setLevel(logging.INFO)
        try:
            strategy = RingSequenceParallelStrategy(sharding="ddp", preemption=preemption)
            given = [Preemption(every_n_steps=7)] if own else []
            trainer = trainer_of(strategy, world, max_epochs=1, limit_train_batches=1, callbacks=given)
            for epochs in (1, 2):
                trainer.fit_loop.max_epochs = epochs
                rows = DataLoader(samples(4), batch_size=2, collate_fn=collated)
                trainer.fit(Module(started(SETTING), SETTING["optimizer"]), rows)
                counts.append([each.every_n_steps for each in trainer.callbacks if isinstance(each, Preemption)])
        finally:
            logger.removeHandler(heard)
            logger.setLevel(level)
    return counts, [message for message in heard.messages if "added the callback Preemption" in message]


@pytest.mark.parametrize(
    ("preemption", "own", "result", "announced"),
    tiered(
        [(True, False, [1], 1), (True, True, [7], 0), (False, False, [], 0), (False, True, [7], 0)],
        quick=[(True, False, [1], 1)],
        long=[(False, True, [7], 0)],
    ),
)
def test_it_is_added_where_there_is_none_and_announced(trainers, preemption, own, result, announced):
    first, second = trainers.run(2, callbacks_of_two_fits, preemption, own)
    assert first[0] == second[0] == [result, result]
    assert (len(first[1]), len(second[1])) == (announced, 0)


def test_what_is_not_a_number_of_steps():
    from lightning_longnet.callbacks import Preemption

    for steps in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="every_n_steps must be a number of steps, at least 1"):
            Preemption(every_n_steps=steps)


@pytest.mark.parametrize(
    "signalled",
    tiered(
        WHILE,
        quick=[],
        long=["twice, and while it saves", "in a validation"],
    ),
)
def test_whenever_it_comes(trainers, undisturbed, tmp_path, signalled):
    stop_and_go_on(trainers, tmp_path, "fsdp2", *WHILE[signalled], undisturbed("fsdp2"))
