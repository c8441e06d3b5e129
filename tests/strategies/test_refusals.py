"""What cannot work is an error before data, or at the first batch, on all ranks, in words that say what would."""

import re
import sys

import lightning as L
import pytest
import torch
from test_training import FLOAT32
from tiers import tiered
from torch.utils.data import DataLoader
from trained import SMALL_BUCKETS, Module, collated, quiet, samples, started, trainer_of

from lightning_longnet import sequence_context
from lightning_longnet.strategies import RingSequenceParallelStrategy


@pytest.mark.parametrize(
    ("arguments", "devices", "message"),
    [
        ({"sequence_parallel_size": 3}, 4, "sequence_parallel_size must divide the 4 ranks, one of 1, 2, 4, got 3"),
        ({"sequence_parallel_size": 8}, 4, "one of 1, 2, 4, got 8"),
        ({"sequence_parallel_size": 0}, 2, "one of 1, 2, got 0"),
        ({"sequence_parallel_size": 2.0}, 2, "one of 1, 2, got 2.0"),
        ({"sharding": "fsdp"}, 2, "sharding must be one of 'fsdp2', .*'ddp'.*, got 'fsdp'"),
        ({"sharding": ["ddp"]}, 2, "sharding must be one of"),
        ({"exchange": "rings"}, 2, "exchange must be one of 'auto', .*, got 'rings'"),
        ({"placement": "zig"}, 2, "placement must be one of 'auto', 'contiguous', 'zigzag', got 'zig'"),
        ({"accumulate": "samples"}, 2, "accumulate must be one of 'batches', 'tokens', got 'samples'"),
        ({"timeout": 0}, 2, "timeout must be a number of seconds, more than 0, got 0"),
        ({"split_check": "maybe"}, 2, "split_check must be one of 'error', 'warn', 'off', got 'maybe'"),
        ({}, 10_000, "devices must be at most .* processes for each of its .* cores, got 10000"),
        ({"preemption": "no"}, 2, "preemption must be True or False, got 'no'"),
        ({"engine": {"foo": 1}}, 2, r"engine must hold arguments of ModelParallelStrategy, save_dist.*, got \['foo'\]"),
        (
            {"sharding": "ddp", "engine": {"timeout": 3}},
            2,
            r"arguments of DDPStrategy, .*static_graph.*, got \['timeout'\]",
        ),
        ({"sharding": "deepspeed_stage_2", "accumulate": "tokens"}, 2, "accumulate must be 'batches' with deepspeed"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(arguments, devices, message):
    with quiet(), pytest.raises(ValueError, match=message):
        trainer_of(RingSequenceParallelStrategy(**arguments), devices)


def test_an_engine_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs deepspeed: pip install .*or take 'fsdp2', 'hsdp' or 'ddp'"):
        RingSequenceParallelStrategy(sharding="deepspeed_stage_1")


class Told(Module):
    def __init__(self, *arguments, dims):
        super().__init__(*arguments)
        self.sequence_dims = {} if dims is None else dims


def fit_rows(rank, world, rows_of, dims=None, **options):
    with quiet():
        module = Told(started(FLOAT32), FLOAT32["optimizer"], dims=dims)
        strategy = RingSequenceParallelStrategy(sharding="ddp", **options)
        trainer = trainer_of(strategy, world, max_steps=1)
        loader = DataLoader(rows_of(rank), batch_size=2, collate_fn=collated)
        trainer.fit(module, loader)
    return trainer.global_step


def other_rows(rank):
    return samples(4, seed=rank)


def longer_rows(rank):
    return samples(4, length=37 + rank)


def short_rows(rank):
    return samples(4, length=1)


def unknown_rows(rank):
    return [{**row, "quality": torch.ones(37)} for row in samples(4)]


def flat_rows(rank):
    return [{**row, "labels": torch.tensor(1)} for row in samples(4)]


def uneven_rows(rank):
    return [{**row, "labels": row["labels"][1:]} for row in samples(4)]


UNSPLIT = [
    (other_rows, None, "must be given the same batches, and ranks 1 of the sequence group hold others than rank 0"),
    (
        longer_rows,
        None,
        "must be given the same batches, and ranks 1 of the sequence group hold others than rank 0",
    ),
    (
        short_rows,
        None,
        "at least one token for each of the 2 ranks .* got 1: set sequence_parallel_size to at most 1",
    ),
    (unknown_rows, None, r"quality of shape \(2, 37\) is a tensor that nothing is known of.*sequence_dims"),
    (unknown_rows, {"quality": 2}, r"quality is to be split along dimension 2, and has shape \(2, 37\)"),
    (unknown_rows, ["quality"], "sequence_dims must map names to dimensions"),
    (flat_rows, None, r"labels is to be split along dimension 1, and has shape \(2,\)"),
    (uneven_rows, None, "same number of tokens, got input_ids 37, labels 36, attention_mask 37"),
]


@pytest.mark.parametrize(
    ("rows_of", "dims", "message"),
    tiered(UNSPLIT, quick=[UNSPLIT[i] for i in (1, 2, 3, 7)]),
)
def test_batches_that_cannot_be_split_are_refused_on_all_ranks(trainers, rows_of, dims, message):
    for is_result, result in trainers.outcomes(2, fit_rows, rows_of, dims):
        assert not is_result
        assert result[0] is ValueError, result[2]
        assert re.search(message, result[1]), result[1]


def fit_later_differences(rank, world, where):
    """All ranks train on the same batches at first; then they differ where it is said."""

    class Drifting(Told):
        def validation_step(self, batch, batch_idx):
            self.model(batch)

    with quiet():
        module = Drifting(started(FLOAT32), FLOAT32["optimizer"], dims=None)
        trainer = trainer_of(
            RingSequenceParallelStrategy(sharding="ddp"),
            world,
            max_epochs=2,
            limit_train_batches=1,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=0,
        )
        drawn = []

        def training():
            drawn.append(samples(4, seed=rank if where == "epoch" and drawn else 3))
            return DataLoader(drawn[-1], batch_size=2, collate_fn=collated)

        module.train_dataloader = training
        if where == "validation":
            checked = samples(4, seed=rank)
            module.val_dataloader = lambda: DataLoader(checked, batch_size=2, collate_fn=collated)
        trainer.fit(module)


@pytest.mark.parametrize("where", tiered(["epoch", "validation"], quick=["epoch"]))
def test_ranks_are_compared_in_each_epoch_and_in_validation(trainers, where):
    for is_result, result in trainers.outcomes(2, fit_later_differences, where):
        assert not is_result
        assert "must be given the same batches" in result[1], result[2]


def test_what_is_declared_is_split_or_left(trainers):
    assert trainers.run(2, fit_rows, unknown_rows, {"quality": 1}) == [1, 1]
    assert trainers.run(2, fit_rows, unknown_rows, {"quality": None}) == [1, 1]


class Twice(Module):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + super().training_step(batch, batch_idx)


class Manual(Module):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.automatic_optimization = False


def fit_tokens(rank, world, kind):
    with quiet():
        trainer = trainer_of(RingSequenceParallelStrategy(sharding="ddp", accumulate="tokens"), world, max_steps=1)
        trainer.fit(
            kind(started(FLOAT32), FLOAT32["optimizer"]), DataLoader(samples(4), batch_size=2, collate_fn=collated)
        )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Twice, "accumulate='tokens' needs one token_mean with a gradient in each training_step, got 2"),
        (Manual, "accumulate must be 'batches' with manual optimisation"),
    ],
)
def test_tokens_are_accumulated_of_one_mean_alone(trainers, kind, message):
    for is_result, result in trainers.outcomes(2, fit_tokens, kind):
        assert not is_result
        assert message in result[1], result[2]


def fit_whole(rank, world):
    class Generating(L.Callback):
        def __init__(self):
            self.messages = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            prompt = collated(samples(1, length=9))
            with torch.no_grad():
                with sequence_context(module).whole():
                    self.messages.append(module.model(prompt).shape)
                try:
                    module.model(prompt)
                except ValueError as error:
                    self.messages.append(str(error))

    with quiet():
        callback = Generating()
        trainer = trainer_of(RingSequenceParallelStrategy(sharding="ddp"), world, max_steps=1, callbacks=[callback])
        module = Module(started(FLOAT32), FLOAT32["optimizer"])
        trainer.fit(module, DataLoader(samples(4), batch_size=2, collate_fn=collated))
        after = module.model(collated(samples(1, length=9))).shape  # the run is over: layers are their own again
    return callback.messages, after


def test_whole_sequences_are_taken_where_that_is_said(trainers):
    for messages, after in trainers.run(2, fit_whole):
        assert messages[0] == after == (1, 9, 23)
        assert "tokens of each sequence of 37, got 9" in messages[1]
        assert "sequence_context(module).whole()" in messages[1]


def fit_uneven(rank, world, rows_of):
    """Two groups of two ranks, one of which is given what does not fit."""
    with quiet():
        module = Told(started(FLOAT32), FLOAT32["optimizer"], dims=None)
        strategy = RingSequenceParallelStrategy(2, sharding="ddp")
        trainer = trainer_of(strategy, world, max_steps=1, use_distributed_sampler=False)
        trainer.fit(module, DataLoader(rows_of(rank), batch_size=2, collate_fn=collated))


def first_group_differs(rank):
    return samples(4, seed=rank if rank < 2 else 2)


def first_group_is_short(rank):
    return samples(4, length=1 if rank < 2 else 37)


@pytest.mark.parametrize(
    ("rows_of", "message"), [(first_group_differs, "the same batches"), (first_group_is_short, "at least one token")]
)
def test_a_fault_of_one_group_is_an_error_on_all_ranks(trainers, rows_of, message):
    result = trainers.outcomes(4, fit_uneven, rows_of)
    assert [is_result for is_result, _ in result] == [False] * 4
    assert all(message in text[1] for _, text in result[:2])
    assert all(
        "ranks of data_parallel_rank 0 were given a batch that does not fit" in text[1] for _, text in result[2:]
    )


def fit_same(rank, world):
    """What is warned of where a sampler of one's own gives all groups the same."""
    import warnings

    with quiet(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = Told(started(FLOAT32), FLOAT32["optimizer"], dims=None)
        strategy = RingSequenceParallelStrategy(1, sharding="ddp")
        trainer = trainer_of(strategy, world, max_steps=1, use_distributed_sampler=False)
        trainer.fit(module, DataLoader(samples(4), batch_size=2, collate_fn=collated))
    return [str(each.message) for each in caught if "given the same batch" in str(each.message)]


def test_groups_that_are_given_the_same_are_reported(trainers):
    first, second = trainers.run(2, fit_same)
    assert len(first) == 1
    assert "all 2 data-parallel groups were given the same batch" in first[0]
    assert not second


def predict_uneven(rank, world, sharding):
    class Predicting(Told):
        def predict_step(self, batch, batch_idx):
            return self.model(batch).shape

    with quiet():
        module = Predicting(started(FLOAT32), FLOAT32["optimizer"], dims=None)
        trainer = trainer_of(RingSequenceParallelStrategy(1, sharding=sharding, timeout=60), world)
        return len(trainer.predict(module, DataLoader(samples(3), batch_size=1, collate_fn=collated)))


def test_prediction_of_unequal_numbers_is_refused_where_it_would_hang(trainers):
    assert trainers.run(2, predict_uneven, "ddp") == [2, 1]
    for is_result, result in trainers.outcomes(2, predict_uneven, "fsdp2"):
        assert not is_result
        assert "all data-parallel groups must predict as many batches" in result[1]
        assert "got 2, 1" in result[1]


def fit_half_sharded(rank, world):
    from torch.distributed.fsdp import fully_shard

    class HalfSharded(Told):
        def configure_model(self):
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    with quiet():
        module = HalfSharded(started(FLOAT32), FLOAT32["optimizer"], dims=None)
        trainer_of(RingSequenceParallelStrategy(), world, max_steps=1).fit(
            module, DataLoader(samples(4), batch_size=2, collate_fn=collated)
        )


def test_parameters_sharded_over_some_ranks_are_refused(trainers):
    for is_result, result in trainers.outcomes(2, fit_half_sharded):
        assert not is_result
        assert "is sharded over 1 of 2 ranks: in configure_model call fully_shard with the whole" in result[1]


def fit_left_over(rank, world):
    with quiet():
        module = Told(started(FLOAT32), FLOAT32["optimizer"], dims=None)
        strategy = RingSequenceParallelStrategy(sharding="deepspeed_stage_2", engine=SMALL_BUCKETS)
        trainer = trainer_of(strategy, world, accumulate_grad_batches=2, limit_train_batches=3)
        trainer.fit(module, DataLoader(samples(8), batch_size=2, collate_fn=collated))


@pytest.mark.long
def test_deepspeed_is_left_no_incomplete_window(deepspeed_trainers):
    for is_result, result in deepspeed_trainers(2).outcomes(2, fit_left_over):
        assert not is_result
        assert "must be a multiple of accumulate_grad_batches, 2, got 3" in result[1]


def described(rank, world, size, sharding, **options):
    """What a strategy made of its arguments."""
    from torch.distributed.fsdp import FSDPModule

    with quiet():
        torch.manual_seed(rank)
        strategy = RingSequenceParallelStrategy(size, sharding=sharding, **options)
        module = Told(started(FLOAT32, seed=rank), FLOAT32["optimizer"], dims=None)
        module.register_buffer("drawn", torch.randn(3))
        trainer = trainer_of(strategy, world, max_steps=1)
        trainer.fit(module, DataLoader(samples(4), batch_size=2, collate_fn=collated))
        context = strategy.sequence_context
        result = {
            "mesh": context.mesh.mesh.tolist(),
            "placement": (context.placement, context.exchange),
            "seed": context.seed,
            "buffer": module.drawn.tolist(),
            "timeout": strategy._timeout.total_seconds(),
            "mean": strategy.reduce(torch.tensor(float(rank))).item(),
            "layers": [block.attention.sequence_context for block in module.model.blocks],
            "window": context.token_window.means,
        }
        weight = module.model.head.weight
        if isinstance(module, FSDPModule):
            result["sharded over"] = [str(each) for each in weight.placements]
            result["offload"] = type(module._get_fsdp_state()._fsdp_param_group.offload_policy).__name__
    return result


def describe(rank, world, size, sharding, options):
    return described(rank, world, size, sharding, **options)


def test_arguments_reach_what_they_are_of(trainers):
    options = {"placement": "zigzag", "exchange": "ring", "timeout": 77}
    for result in trainers.run(4, describe, 2, "hsdp", options):
        assert result["mesh"] == [[0, 1], [2, 3]]
        assert result["placement"] == ("zigzag", "ring")
        assert result["sharded over"] == ["Replicate()", "Shard(dim=0)"] or result["sharded over"] == ["R", "S(0)"]
        assert result["timeout"] == 77
        assert result["mean"] == 1.5
        assert result["layers"] == [None, None]  # the run is over
        assert result["offload"] == "OffloadPolicy"


@pytest.mark.parametrize(
    ("sharding", "policy"),
    tiered(
        [("fsdp2", "OffloadPolicy"), ("fsdp2_offload", "CPUOffloadPolicy")],
        quick=[("fsdp2_offload", "CPUOffloadPolicy")],
    ),
)
def test_ranks_end_up_equal_and_parameters_where_they_are_said_to_be(trainers, sharding, policy):
    first, second = trainers.run(2, describe, 2, sharding, {})
    assert first["seed"] == second["seed"]
    assert first["buffer"] == second["buffer"]
    assert first["offload"] == policy
