"""A run that goes on from any checkpoint has the losses of one that was never stopped, attention dropout and all."""

import pytest
import torch
from interrupted import Run, checkpoints_by_steps, checkpoints_everywhere
from tiers import tiered

# five batches in an epoch make three steps of the optimizer, and a validation after two, four and seven
STEPS = {"accumulate_grad_batches": 2, "val_check_interval": 2}


def micro_batches(name):
    """How many there were when this was saved."""
    place = name.removesuffix(".ckpt")
    return int(place.split("-")[0]) if "-" in place else 2 * int(place.removeprefix("step="))


def compare(
    trainers,
    tmp_path,
    world,
    kind,
    chosen=None,
    callbacks=checkpoints_everywhere,
    size=None,
    resumed_by=None,
    **options,
):
    folder, other = tmp_path / "saved", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    options, case = {**STEPS, **options}, (kind, size or world)
    ((right, _, names), *_) = trainers.run(world, Run(str(folder), *case, callbacks=callbacks, **options))
    assert sorted(right) == list(range(len(right)))
    assert set(chosen or names) <= set(names), names
    for name in chosen or names:
        again = Run(str(other), resumed_by or kind, size or world, resume=str(folder / name), **options)
        for result, code, _ in trainers.run(world, again):
            assert code is None
            expected = {step: loss for step, loss in right.items() if step >= micro_batches(name)}
            assert sorted(result) == sorted(expected), name
            for step, loss in expected.items():
                message = f"{name}, {step}: {result[step]}, not {loss}"
                torch.testing.assert_close(result[step], loss, rtol=1e-9, atol=0, msg=message)


@pytest.mark.parametrize("kind", tiered(["ddp", "fsdp2"], quick=["ddp"], long=[]))
def test_in_the_middle_of_a_later_epoch(trainers, tmp_path, kind):
    compare(trainers, tmp_path, 2, kind, ["7-batch.ckpt"])


@pytest.mark.parametrize(
    ("saved_by", "resumed_by"),
    tiered([("ddp", "fsdp2"), ("fsdp2 in one file", "ddp")], quick=[], long=[("ddp", "fsdp2")]),
)
def test_one_file_goes_on_under_another_engine(trainers, tmp_path, saved_by, resumed_by):
    compare(trainers, tmp_path, 2, saved_by, ["7-batch.ckpt"], resumed_by=resumed_by)


@pytest.mark.parametrize(
    ("kind", "world", "size"),
    tiered(
        [("ddp", 1, 1), ("fsdp2", 1, 1), ("ddp", 2, 1), ("fsdp2", 2, 2)],
        quick=[],
        long=[("fsdp2", 2, 2)],
    ),
)
def test_from_wherever_it_was_saved(trainers, tmp_path, kind, world, size):
    names = ["2-validation.ckpt", "5-batch.ckpt", "5-epoch.ckpt", "7-validation.ckpt"]
    compare(trainers, tmp_path, world, kind, names, size=size)


@pytest.mark.parametrize("name", tiered(["step=1.ckpt", "step=3.ckpt"], quick=[], full=["step=1.ckpt"]))
def test_what_model_checkpoint_saves_of_whole_batches(trainers, tmp_path, name):
    compare(trainers, tmp_path, 1, "fsdp2", [name], checkpoints_by_steps, loading={"drop_last": True})


@pytest.mark.long
def test_with_workers(trainers, tmp_path):
    loading = {"num_workers": 2, "drop_last": True}
    compare(trainers, tmp_path, 1, "fsdp2", ["step=3.ckpt"], checkpoints_by_steps, loading=loading)


@pytest.mark.full
def test_after_an_epoch_with_workers(trainers, tmp_path):
    compare(trainers, tmp_path, 1, "ddp", ["5-epoch.ckpt"], loading={"num_workers": 2})


def test_other_data_is_refused(trainers, tmp_path):
    (folder := tmp_path / "saved").mkdir()
    trainers.run(1, Run(str(folder), "ddp", 1, callbacks=checkpoints_everywhere, **STEPS))
    resume = {"resume": str(folder / "4-batch.ckpt")}
    ((fine, error),) = trainers.outcomes(1, Run(str(folder), "ddp", 1, loading={"iterable": 12}, **resume, **STEPS))
    assert not fine
    assert error[0] is ValueError
    assert "saved after 4 batches of an epoch, and the training data has 3" in error[1]
