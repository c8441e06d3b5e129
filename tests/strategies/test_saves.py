"""Checkpoints of each engine are whole or absent; what is damaged is named, and the newest good one is loaded."""

import os
import shutil
import warnings
from importlib.metadata import version
from itertools import product
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from test_training import FLOAT32
from tiers import tiered
from trained import adamw, fit, samples

from lightning_longnet import ManifestCheckpointIO, read_checkpoint
from lightning_longnet.checkpointing.index import INDEX
from lightning_longnet.checkpointing.manifest import sum_of
from lightning_longnet.checkpointing.newest import check_checkpoint, newest_checkpoint
from lightning_longnet.strategies import RingSequenceParallelStrategy
from lightning_longnet.strategies.deepspeed_files import copy_files, write_files
from lightning_longnet.strategies.saves import Pending
from lightning_longnet.supervision.record import SAVE

ENGINES = ["ddp", "fsdp2", "hsdp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
SAVED_ALIKE = ["hsdp", "deepspeed_stage_1", "deepspeed_stage_2"]  # in the forms of fsdp2 and of deepspeed_stage_3
SETTING = {**FLOAT32, "optimizer": adamw, "samples": samples(24), "micro_batches": 4, "accumulate": 1}


def fit_with_last(rank, world, sharding, folder, resume_from=None, top=-1, **options):
    """Losses, parameters and the warnings about checkpoints of a run that saves each step and `last`."""
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=top, save_last=True)
    with warnings.catch_warnings(record=True) as result:
        losses, parameters = fit(rank, world, SETTING, sharding, world, resume_from, [saving], **options)
    return losses, parameters, [str(each.message) for each in result if each.category is RuntimeWarning]


@pytest.fixture(scope="module")
def saved(trainers, deepspeed_trainers, tmp_path_factory):
    """Folders with checkpoints of two ranks, or one, by engine, and the losses of the run."""
    made = {}

    def folder(engine, world=2):
        if (engine, world) not in made:
            path = tmp_path_factory.mktemp(engine)
            workers = deepspeed_trainers(world) if engine.startswith("deepspeed") else trainers
            ((losses, *_), *_) = workers.run(world, fit_with_last, engine, str(path))
            made[engine, world] = path, losses
        return made[engine, world]

    return folder


def cut(path, _):
    os.truncate(path, path.stat().st_size - 1)


def empty(path, _):
    os.truncate(path, 0)


def flip(path, _):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def delete(path, _):
    path.unlink()


def take_from(path, other):
    shutil.copy(other, path)


DAMAGES = {"cut": cut, "empty": empty, "flip": flip, "delete": delete, "older": take_from, "mesh": take_from}


def files_of(checkpoint):
    """The files of a checkpoint that are read when it is loaded, and its manifest."""
    if checkpoint.is_file():
        return [checkpoint]
    inside = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    return [path for path in inside if path.suffix != ".py"]


@pytest.mark.parametrize(
    ("engine", "kind"),
    tiered(
        product(ENGINES, DAMAGES),
        quick=[("fsdp2", "flip"), ("fsdp2", "older")],
        long=[("deepspeed_stage_3", "delete")],
    ),
)
def test_each_damaged_file_is_named_and_passed_over(saved, engine, kind, tmp_path):
    source, _ = saved(engine)
    shutil.copytree(source, tmp_path / "run")
    last, older = tmp_path / "run/last.ckpt", tmp_path / "run/step=2.ckpt"
    shutil.rmtree(tmp_path / "run/step=4.ckpt", ignore_errors=True)
    other = saved(engine, 1)[0] / "last.ckpt" if kind == "mesh" else older
    assert newest_checkpoint(tmp_path / "run", reads_all=True) == last
    for path in files_of(last):
        name = path.relative_to(last)
        if kind in ("older", "mesh") and path.is_file() and not (other / name).is_file():
            continue
        if kind in ("older", "mesh") and (other / name).read_bytes() == path.read_bytes():
            continue  # as "latest" of DeepSpeed
        held = path.read_bytes()
        DAMAGES[kind](path, other / name)
        named = str(path if path.exists() and path.name != "manifest.json" else last)
        with pytest.warns(RuntimeWarning) as result:
            assert newest_checkpoint(tmp_path / "run", reads_all=True) != last
        assert any(named in str(each.message) for each in result), [str(each.message) for each in result]
        path.write_bytes(held)
    assert newest_checkpoint(tmp_path / "run", reads_all=True) == last


@pytest.mark.parametrize("engine", tiered(ENGINES, quick=[], full=SAVED_ALIKE))
def test_a_run_goes_on_from_the_newest_good_one(trainers, deepspeed_trainers, saved, engine, tmp_path):
    source, losses = saved(engine)
    shutil.copytree(source, tmp_path / "run")
    flip(files_of(tmp_path / "run/last.ckpt")[-1], None)
    flip(files_of(tmp_path / "run/step=4.ckpt")[0], None)
    flip(files_of(tmp_path / "run/step=3.ckpt")[-1], None)
    workers = deepspeed_trainers(2) if engine.startswith("deepspeed") else trainers
    result = workers.run(2, fit_with_last, engine, str(tmp_path / "run"), str(tmp_path / "run/last.ckpt"))
    for rest, _, _ in result:
        assert rest == losses[2:]


def fit_without_name(rank, world, sharding, folder):
    """As a run is started again, without the name of a checkpoint."""
    return fit_with_last(rank, world, sharding, folder, "last")


@pytest.mark.parametrize("engine", tiered(ENGINES, quick=[], long=["fsdp2"]))
def test_last_is_found_when_its_name_is_gone(trainers, deepspeed_trainers, saved, engine, tmp_path):
    source, losses = saved(engine)
    shutil.copytree(source, tmp_path / "run")
    for name in ("last.ckpt", "step=4.ckpt", "step=3.ckpt"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    workers = deepspeed_trainers(2) if engine.startswith("deepspeed") else trainers
    for rest, _, _ in workers.run(2, fit_without_name, engine, str(tmp_path / "run")):
        assert rest == losses[2:]


def fit_on_full_disk(rank, world, sharding, folder, in_background):
    """The error of a rank whose neighbour cannot write its second checkpoint, and its name."""
    from lightning_longnet.checkpointing import streams

    written, write = [], streams.SummedFile.write

    def full(self, content):
        if "step=2" in str(self._file.name) and rank == world - 1:
            raise OSError(28, "No space left on device")
        written.append(1)
        return write(self, content)

    streams.SummedFile.write = full
    try:
        fit_with_last(rank, world, sharding, folder, background_saves=in_background)
    except RuntimeError as error:
        return str(error)
    finally:
        streams.SummedFile.write = write
    return ""


@pytest.mark.parametrize("in_background", tiered([False, True], quick=[False]))
def test_an_error_of_one_rank_is_raised_on_all(trainers, tmp_path, in_background):
    for message in trainers.run(2, fit_on_full_disk, "fsdp2", str(tmp_path), in_background):
        assert "step=2.ckpt is not saved" in message
        assert "No space left" in message
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [INDEX, "last.ckpt", "step=1.ckpt"]
    assert check_checkpoint(tmp_path / "last.ckpt").step == 1


def save_in_place_of_a_folder(rank, world, path):
    """The error of a save in one file that fails, where a folder has its name, and whether the folder is there then."""
    from trained import Module, quiet, sgd, trainer_of

    with quiet():
        strategy = RingSequenceParallelStrategy(sharding="fsdp2", engine={"save_distributed_checkpoint": False})
        trainer = trainer_of(strategy, world, max_steps=0)
        tokens = torch.zeros(1, 4, dtype=torch.long)
        trainer.fit(Module(torch.nn.Linear(1, 1), sgd), [{"input_ids": tokens, "labels": tokens}])
        errors = []
        for fails in (True, False):
            with pytest.MonkeyPatch.context() as patched:
                if fails:
                    patched.setattr("lightning_longnet.checkpointing.checkpoint_io.save_whole", None)
                try:
                    trainer.save_checkpoint(path)
                except RuntimeError as error:
                    errors.append(str(error))
                errors.append(Path(path).is_dir())
    return errors


def test_one_file_takes_the_place_of_a_folder_when_it_is_written(trainers, tmp_path):
    (path := tmp_path / "last.ckpt").mkdir()
    (path / "meta.pt").write_text("of FSDP2")
    ((error, is_there, is_still_there),) = trainers.run(1, save_in_place_of_a_folder, str(path))
    assert "is not saved" in error
    assert (is_there, is_still_there) == (True, False)
    assert path.is_file()
    assert check_checkpoint(path).form == "file"


def test_a_manifest_says_what_wrote_it(saved):
    folder, _ = saved("fsdp2")
    manifest = check_checkpoint(folder / "last.ckpt")
    assert (manifest.step, manifest.world, manifest.engine, manifest.form) == (4, 2, "fsdp2", "fsdp2")
    assert manifest.mesh == {"data_parallel": 1, "sequence_parallel": 2}
    assert manifest.versions["torch"] == version("torch")
    assert set(manifest.files) == {".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"}
    assert Path(folder / INDEX).is_file()


def fit_in_background(rank, world, sharding, folder):
    return fit_with_last(rank, world, sharding, folder, top=1, background_saves=True)


@pytest.mark.parametrize("engine", tiered(ENGINES, quick=[], long=["fsdp2", "deepspeed_stage_3"]))
def test_saves_in_the_background_are_those_of_their_step(trainers, deepspeed_trainers, saved, engine, tmp_path):
    folder, losses = saved(engine)
    workers = deepspeed_trainers(2) if engine.startswith("deepspeed") else trainers
    for result, _, _ in workers.run(2, fit_in_background, engine, str(tmp_path)):
        assert result == losses
    assert not list(tmp_path.glob(".*.part"))
    for path in tmp_path.glob("*.ckpt"):
        right = folder / path.name
        assert check_checkpoint(path).step == check_checkpoint(right).step
        state, expected = (read_checkpoint(each).state_dict for each in (path, right))
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    for rest, _, _ in workers.run(2, fit_with_last, engine, str(tmp_path / "rest"), str(tmp_path / "last.ckpt")):
        assert rest == []


@pytest.mark.parametrize("is_current", [True, False])
def test_each_format_of_deepspeed_has_its_sums(tmp_path, is_current):
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    engine = type("Engine", (), {"_copy_recovery_script": lambda self, path: None})()
    engine.checkpoint_engine = TorchCheckpointEngine()
    engine.checkpoint_engine.zipfile_serialization = is_current
    folder, weights = tmp_path / "last.ckpt", torch.arange(1e6)
    folder.mkdir()

    def save():
        engine.checkpoint_engine.save(state_dict={"x": weights}, path=str(folder / "a.pt"))

    assert write_files(engine, folder, save) == {"a.pt": sum_of(folder / "a.pt")}
    assert torch.equal(torch.load(folder / "a.pt", weights_only=True)["x"], weights)
    if is_current:
        (copy,) = copy_files(engine, folder, save).values()
        assert copy.store(folder / "b.pt") == sum_of(folder / "a.pt")
    else:
        with pytest.raises(ValueError, match=r"must choose no writer"):
            copy_files(engine, folder, save)


def phases_of_saves(rank, world, sharding, folder):
    """The phases in which folders that are written in the background get their names."""
    from lightning_longnet.checkpointing.background import BackgroundWriter
    from lightning_longnet.strategies.saves import CheckpointSaves

    phases, finish = [], CheckpointSaves._finish_folder

    def finish_and_note(self, *arguments):
        phases.append(self.progress.phase)
        finish(self, *arguments)

    def is_done(self):
        return self._work is None or self._work.exception() is None

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CheckpointSaves, "_finish_folder", finish_and_note)
        patched.setattr(BackgroundWriter, "is_done", property(is_done))
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        fit(rank, world, SETTING, sharding, world, None, [saving], background_saves=True)
    return phases


def test_a_save_in_the_background_ends_in_the_phase_of_a_save(trainers, tmp_path):
    (phases,) = trainers.run(1, phases_of_saves, "fsdp2", str(tmp_path))
    assert phases == [SAVE] * 4


@pytest.mark.parametrize("ending", ["teardown", "error of another rank"])
def test_what_a_folder_without_a_name_was_to_replace_stays(tmp_path, monkeypatch, ending):
    names = [tmp_path / f"step={step}.ckpt" for step in (1, 2)]
    writer = ManifestCheckpointIO()
    for path in names:
        writer.save_checkpoint({"state_dict": {}, "callbacks": {}}, path)
    strategy = RingSequenceParallelStrategy(sharding="fsdp2", background_saves=True, accelerator=CPUAccelerator())
    strategy.cluster_environment = LightningEnvironment()
    strategy._pending = Pending(tmp_path / "step=3.ckpt", tmp_path / ".unfinished")
    strategy.checkpoint_io.writer.begin(dict)
    strategy.checkpoint_io.remove_checkpoint(names[0])
    if ending != "teardown":
        monkeypatch.setattr(strategy, "_gathered", lambda value: [value, (None, "OSError: No space left on device")])
        with pytest.raises(RuntimeError, match=r"step=3.ckpt is not saved: rank 1: OSError: No space left"):
            strategy.settle_saves()
    strategy.teardown()
    strategy.checkpoint_io.wait()  # as the next save does
    assert names[0].exists()
    assert not (tmp_path / "step=3.ckpt").exists()


def test_saves_in_the_background_are_refused_by_name():
    with pytest.raises(ValueError, match="background_saves must be True or False, got 'yes'"):
        RingSequenceParallelStrategy(background_saves="yes")
    with pytest.raises(ValueError, match="background_saves must be False with a checkpoint_io, got TorchCheckpointIO"):
        RingSequenceParallelStrategy(background_saves=True).checkpoint_io = TorchCheckpointIO()


REFUSED = [
    *(("fsdp2", "ddp", "'fsdp2_offload' or 'hsdp'"), ("deepspeed_stage_2", "fsdp2", "'deepspeed_stage_1' or")),
    *(
        ("ddp", "deepspeed_stage_2", "'ddp', 'fsdp2', 'fsdp2_offload' or"),
        ("fsdp2", "deepspeed_stage_3", "'fsdp2_offload' or 'hsdp'"),
    ),
    ("deepspeed_stage_2", "deepspeed_stage_3", "1 or 2, which"),
    ("deepspeed_stage_3", "deepspeed_stage_1", "'deepspeed_stage_3' or 'deepspeed_stage_3_offload'"),
]


@pytest.mark.parametrize(("engine", "other", "words"), tiered(REFUSED, quick=REFUSED[:1], long=REFUSED[1:2]))
def test_a_checkpoint_of_an_engine_that_cannot_be_read_is_refused(
    trainers, deepspeed_trainers, saved, engine, other, words
):
    path = saved(engine)[0] / "last.ckpt"
    workers = deepspeed_trainers(2) if other.startswith("deepspeed") else trainers
    for is_result, error in workers.outcomes(2, fit_with_last, other, str(path.parent), str(path)):
        assert not is_result
        assert error[0] is ValueError, error[2]
        assert f"{path} is " in error[1]
        assert f"sharding='{other}' cannot go on from: take" in error[1]
        assert words in error[1]
