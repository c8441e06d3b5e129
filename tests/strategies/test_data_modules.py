"""Data modules under a Trainer: the same run on any mesh, where each rank reads its own tokens alone."""

import multiprocessing
import os

import lightning as L
import pytest
import torch
from interrupted import checkpoints_everywhere
from lightning.pytorch.strategies import DDPStrategy
from tiers import tiered
from torch import nn
from trained import PATTERN, SMALL_BUCKETS, quiet, sums, trainer_of

from lightning_longnet import ByteData, DilatedSelfAttention, LongRangeData, sequence_context
from lightning_longnet.data.streams import Slice, Stream
from lightning_longnet.strategies import RingSequenceParallelStrategy

TOKENS, BATCH = 64, 4
TEXT = "\n".join(f"{i} plus {i} is {2 * i}, and {i} times {i} is {i * i}" for i in range(70))
MESHES = {"1x1": (1, 1), "1x2": (2, 2), "2x1": (2, 1), "2x2": (4, 2)}


class Model(L.LightningModule):
    """Keeps the losses of training, the loss of validation, and the tokens of each global batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(256, 16)
        self.attention = DilatedSelfAttention(16, 4, PATTERN, dropout=0.1)
        self.head = nn.Linear(16, 256)
        self.double()
        self.losses, self.steps, self.batches, self.validated, self.rows = [], [], [], [], []

    def forward(self, batch):
        x = self.embedding(batch["input_ids"])
        return self.head(x + self.attention(x, documents=batch.get("documents")))

    def training_step(self, batch, batch_idx):
        context = sequence_context(self)
        loss = context.token_mean(*sums(self(batch), batch["labels"]))
        self.losses.append(loss.item())
        self.steps.append(self.trainer.fit_loop.epoch_loop.total_batch_idx)
        self.batches.append(gathered(context, batch["input_ids"]))
        return loss

    def validation_step(self, batch, batch_idx):
        context = sequence_context(self)
        self.validated.append([x.item() for x in total(sums(self(batch), batch["labels"]))])
        self.rows.append(gathered(context, batch["input_ids"]))

    def predict_step(self, batch, batch_idx):
        return sequence_context(self).gather_sequence(self(batch)).argmax(-1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


def total(pair):
    both = torch.stack([pair[0].detach(), pair[1].double()])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(both)
    return both


def gathered(context, ids):
    """Rows of all ranks, as they are numbered."""
    whole = context.gather_sequence(ids)
    if context.data_parallel_group is None:
        return whole
    result = context.gather_samples(whole)
    return torch.stack(result, 1).flatten(0, 1)


class Counted:
    """How many tokens are read of streams of files in here, in training."""

    def __enter__(self):
        self.tokens, self.before = 0, Stream.read

        def read(stream, begin, end):
            self.tokens += 0 if isinstance(stream, Slice) else end - begin
            return self.before(stream, begin, end)

        Stream.read = read
        return self

    def __exit__(self, *_):
        Stream.read = self.before


def train(
    rank,
    world,
    kind,
    size,
    path,
    *,
    data=None,
    callbacks=(),
    resume=None,
    read_parts=True,
    workers=0,
    placement="contiguous",
    **options,
):
    multiprocessing.current_process()._config["daemon"] = False  # else the loader may have no workers
    os.environ["PL_GLOBAL_SEED"] = "5"
    data = {"tokens": TOKENS, "batch_size": BATCH * size // world, "num_workers": workers, "read_parts": read_parts} | (
        data or {}
    )
    with quiet():
        engine = SMALL_BUCKETS if kind.startswith("deepspeed") else None
        ours = {"placement": placement, "timeout": 60, "engine": engine}
        strategy = DDPStrategy() if kind == "stock ddp" else RingSequenceParallelStrategy(size, kind, **ours)
        module, loaded = Model(), ByteData(path, validation_share=0.12, seed=2, **data)
        trainer = trainer_of(
            strategy, world, **{"max_epochs": 2, "num_sanity_val_steps": 0, "callbacks": callbacks} | options
        )
        loaded.prepare_data()
        loaded.setup("fit")  # which reads, to count the frequencies of bytes
        loaded.setup = lambda stage: None
        with Counted() as counted:
            trainer.fit(module, datamodule=loaded, ckpt_path=resume)
    return module, counted.tokens


def run(*arguments, **options):
    module, count = train(*arguments, **options)
    return module.losses, module.batches, module.validated, module.rows, count, module.steps


class Run:
    """`run` with its arguments, to be sent to workers."""

    def __init__(self, *arguments, **options):
        self.arguments, self.options = arguments, options

    def __call__(self, rank, world):
        return run(rank, world, *self.arguments, **self.options)


def save(rank, world, folder, kind, size, path):
    run(rank, world, kind, size, path, callbacks=checkpoints_everywhere(folder))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    (result := tmp_path_factory.mktemp("text") / "sums.txt").write_text(TEXT)
    return str(result)


@pytest.fixture(scope="module")
def alone(trainers, path):
    (result,) = trainers.run(1, run, "ddp", 1, path)
    return result


def same(result, expected):
    for name, a, b in zip(("losses", "batches", "validated", "rows"), result, expected, strict=False):
        assert len(a) == len(b), name
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(torch.as_tensor(x), torch.as_tensor(y), rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("mesh", tiered(["1x2", "2x1"], quick=["2x1"], long=[]))
def test_a_run_is_that_of_one_process_on_any_mesh(trainers, alone, path, mesh):
    world, size = MESHES[mesh]
    losses, batches, _, rows, *_ = alone
    assert losses[-1] < losses[0]
    assert [len(batch) for batch in batches] == [BATCH] * len(batches)
    assert not torch.equal(batches[0], batches[len(batches) // 2])  # the second epoch has an order of its own
    assert len(rows[-1]) % 2  # so that two groups of ranks cannot share it
    for result in trainers.run(world, run, "ddp", size, path):
        if mesh == "2x1":  # the row that one has more is one without targets
            result[3][-1], result[3][len(rows) // 2 - 1] = (
                x[:-1] for x in (result[3][-1], result[3][len(rows) // 2 - 1])
            )
        same(result, alone)


@pytest.mark.long
def test_each_rank_reads_its_half(trainers, alone, path):
    parts = trainers.run(2, run, "ddp", 2, path)
    wholes = trainers.run(2, Run("ddp", 2, path, read_parts=False))
    many = 2 * sum(len(batch) for batch in alone[1]) // 2 + sum(len(batch) for batch in alone[3])
    for part, whole in zip(parts, wholes, strict=True):
        same(part, whole)
        assert whole[4] == alone[4] == many * (TOKENS + 1)
        assert part[4] == many * (TOKENS // 2 + 1)


@pytest.mark.parametrize(
    ("placement", "workers"), tiered([("zigzag", 0), ("contiguous", 1)], quick=[], full=[("contiguous", 1)])
)
def test_packed_documents(trainers, tmp_path, placement, workers):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(TEXT[50 * i : 50 * i + 13 + 5 * i])
    options = {"data": {"packed": True, "pattern": "*.txt"}, "max_epochs": 1}
    (expected,) = trainers.run(1, Run("ddp", 1, str(tmp_path), **options))
    assert len(expected[0]) > 3
    for result in trainers.run(2, Run("ddp", 2, str(tmp_path), workers=workers, placement=placement, **options)):
        same(result, expected)


@pytest.mark.parametrize("workers", tiered([0, 1], quick=[], full=[0]))
def test_a_run_goes_on_without_reading_what_was_trained_on(trainers, tmp_path, alone, path, workers):
    trainers.run(1, save, str(tmp_path), "ddp", 1, path)
    steps = len(alone[0]) // 2
    name = f"{steps + steps // 2}-batch.ckpt"  # in the middle of the second epoch
    resumed = trainers.run(2, Run("ddp", 2, path, resume=str(tmp_path / name), workers=workers))
    left = 2 * steps - (steps + steps // 2)
    for losses, batches, _, rows, count, numbers in resumed:
        assert numbers == list(range(2 * steps - left, 2 * steps))
        same((losses, batches), (alone[0][-left:], alone[1][-left:]))
        if not workers:
            assert count == (left * BATCH + sum(len(x) for x in rows)) * (TOKENS // 2 + 1)


@pytest.mark.long
def test_stock_strategies_are_dealt_the_same(trainers, alone, path):
    first, second = (each[1] for each in trainers.run(2, run, "stock ddp", 1, path))
    for mine, other, batch in zip(first, second, alone[1], strict=True):
        assert torch.equal(torch.stack([mine, other], 1).flatten(0, 1), batch)


def predict(rank, world, size, path):
    with quiet():
        trainer = trainer_of(RingSequenceParallelStrategy(size, "ddp", timeout=60), world)
        return torch.cat(trainer.predict(Model(), datamodule=ByteData(path, TOKENS, 2, validation_share=0.12)))


def test_each_row_is_predicted_once(trainers, path):
    (expected,) = trainers.run(1, predict, 1, path)
    assert len(expected) == 5
    for result in trainers.run(2, predict, 2, path):
        assert torch.equal(result, expected)
    for rank, result in enumerate(trainers.run(2, predict, 1, path)):
        assert torch.equal(result, expected[rank::2])


@pytest.mark.full
def test_deepspeed_reads_the_same(deepspeed_trainers, alone, path):
    """Its steps have an engine's own rounding."""
    for result in deepspeed_trainers(2).run(2, Run("deepspeed_stage_1", 2, path, max_epochs=1)):
        same(([], result[1]), ([], alone[1][: len(result[1])]))
        assert result[4] == (sum(map(len, result[1])) + sum(map(len, result[3]))) * (TOKENS // 2 + 1)


def other_samples(rank, world, path):
    run(rank, world, "ddp", world, path, data={"megabytes": (2000 + 100 * rank) / 2**20})


def test_ranks_that_are_given_other_samples(trainers, path):
    for fine, error in trainers.outcomes(2, other_samples, path):
        assert not fine
        assert error[0] is ValueError
        assert "ranks that share sequences must be given the same batches" in error[1]


def too_short(rank, world):
    with quiet():
        trainer = trainer_of(RingSequenceParallelStrategy(world, "ddp", timeout=60), world)
        trainer.fit(Model(), datamodule=LongRangeData("needle", tokens=3, distance=1))


def test_rows_of_fewer_tokens_than_ranks(trainers):
    for fine, error in trainers.outcomes(4, too_short):
        assert (fine, error[0]) == (False, ValueError)
        assert "tokens must be at least one for each of 4 ranks that share a row, got 3" in error[1]
