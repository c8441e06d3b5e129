"""A checkpoint in one file is whole or absent, and what is damaged is named and passed over."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from importlib.metadata import version
from pathlib import Path

import lightning as L
import pytest
import torch
from kills import counted, killed_at
from tiers import tiered
from torch import nn

from lightning_longnet import ManifestCheckpointIO, newest_checkpoint, read_checkpoint
from lightning_longnet.checkpointing import streams
from lightning_longnet.checkpointing.index import INDEX
from lightning_longnet.checkpointing.manifest import sum_of
from lightning_longnet.checkpointing.newest import check_checkpoint
from lightning_longnet.checkpointing.streams import SummedFile, save_summed


def content(step):
    return {"state_dict": {"x": torch.full((500,), float(step))}, "global_step": step, "epoch": 0, "callbacks": {}}


def save(folder, *steps, name="step={}.ckpt"):
    writer = ManifestCheckpointIO()
    for step in steps:
        writer.save_checkpoint(content(step), folder / name.format(step))


def newest_step(folder, **options):
    """The step of the newest good checkpoint, all of whose values are of that step."""
    path = newest_checkpoint(folder, reads_all=True, **options)
    if path is None:
        return None
    result = torch.load(path, weights_only=True)
    assert (result["state_dict"]["x"] == result["global_step"]).all()
    return result["global_step"]


def test_torch_reads_what_is_written(tmp_path):
    save(tmp_path, 3)
    path = tmp_path / "step=3.ckpt"
    for mmap in (False, True):
        assert torch.load(path, mmap=mmap, weights_only=True)["global_step"] == 3
    manifest = check_checkpoint(path)
    assert (manifest.step, manifest.world, manifest.form, manifest.name) == (3, 1, "file", path.name)
    assert manifest.versions["torch"] == version("torch")
    assert json.loads((tmp_path / INDEX).read_text())["newest"] == path.name


def _flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 8
    path.write_bytes(content)


DAMAGES = {
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 40),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "flipped": _flip,
    "first byte flipped": lambda path: _flip(path, 0),
    "manifest flipped": lambda path: _flip(path, 0.95),
    "last byte flipped": lambda path: _flip(path, 1),
    "from an older save": lambda path: shutil.copy(path.with_name("step=1.ckpt"), path),
    "exchanged": lambda path: os.replace(shutil.copy(path.with_name("step=2.ckpt"), path.with_name("other")), path),
    "manifest lost": lambda path: torch.save(torch.load(path, weights_only=True), path),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_named_and_passed_over(tmp_path, kind):
    save(tmp_path, 1, 2, 3)
    path = tmp_path / "step=3.ckpt"
    DAMAGES[kind](path)
    with pytest.warns(RuntimeWarning, match=str(path)):
        assert newest_step(tmp_path) == 2
    with pytest.warns(RuntimeWarning, match=rf"{path} .*; loading {tmp_path}/step=2.ckpt, the newest good checkpoint"):
        assert ManifestCheckpointIO().load_checkpoint(path)["global_step"] == 2


def test_weights_of_a_damaged_file_are_not_read(tmp_path):
    save(tmp_path, 1)
    assert (read_checkpoint(tmp_path / "step=1.ckpt").state_dict["x"] == 1).all()
    _flip(tmp_path / "step=1.ckpt")
    with pytest.raises(ValueError, match="step=1"):
        read_checkpoint(tmp_path / "step=1.ckpt")


def test_every_byte_counts(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "step=1.ckpt"
    written = path.read_bytes()
    for place in range(0, len(written), 37):
        path.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        with pytest.raises(ValueError, match="step=1"):
            check_checkpoint(path)


def test_one_that_is_deleted_is_not_missed(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "step=2.ckpt").unlink()
    with pytest.warns(RuntimeWarning, match=r"step=2.ckpt does not exist; loading .*step=1.ckpt"):
        assert ManifestCheckpointIO().load_checkpoint(tmp_path / "step=2.ckpt")["global_step"] == 1


def test_without_a_good_one_loading_ends(tmp_path):
    save(tmp_path, 1)
    _flip(tmp_path / "step=1.ckpt")
    with pytest.raises(ValueError, match=r"step=1.ckpt is damaged.*its folder has no good checkpoint"):
        ManifestCheckpointIO().load_checkpoint(tmp_path / "step=1.ckpt")
    with pytest.warns(RuntimeWarning, match="passed over"):
        assert newest_checkpoint(tmp_path, reads_all=True) is None


def test_a_checkpoint_without_a_manifest_loads_with_a_line(tmp_path):
    torch.save(content(5), tmp_path / "old.ckpt")
    with pytest.warns(RuntimeWarning, match="old.ckpt has no manifest.json.*cannot be verified"):
        assert ManifestCheckpointIO().load_checkpoint(tmp_path / "old.ckpt")["global_step"] == 5
    assert newest_step(tmp_path) == 5


def test_a_damaged_index_is_ignored(tmp_path):
    save(tmp_path, 1, 2)
    _flip(tmp_path / INDEX)
    with pytest.warns(RuntimeWarning, match="is damaged and ignored"):
        assert newest_step(tmp_path) == 2


def test_an_index_that_cannot_be_read_is_ignored(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / INDEX).unlink()
    (tmp_path / INDEX).mkdir()
    with pytest.warns(RuntimeWarning, match="is damaged and ignored"):
        assert newest_step(tmp_path) == 2


LARGE = {"x": torch.arange(3_000_000.0), "y": torch.ones(3), "z": torch.arange(1_000_000.0)}  # 16 MB


def test_the_sum_of_pieces_in_threads_is_that_of_the_file(tmp_path):
    sums = save_summed(LARGE, tmp_path / "large")
    assert sums == sum_of(tmp_path / "large")
    result = torch.load(tmp_path / "large", weights_only=True)
    assert all(torch.equal(result[name], x) for name, x in LARGE.items())


def test_an_error_of_the_disk_before_the_end_of_a_file_is_raised(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))  # which the system reports once: fsync then succeeds

    monkeypatch.setattr(streams, "_sync_data", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        save_summed(LARGE, tmp_path / "large")


@pytest.mark.parametrize("method", ["open", "stat"])
def test_a_file_that_cannot_be_read_is_named_and_passed_over(tmp_path, monkeypatch, method):
    save(tmp_path, 1, 2)
    path, stock = tmp_path / "step=2.ckpt", getattr(Path, method)

    def fail(self, *arguments, **options):
        if self == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return stock(self, *arguments, **options)

    monkeypatch.setattr(Path, method, fail)
    with pytest.warns(RuntimeWarning, match=rf"{path} cannot be read: {os.strerror(errno.EIO)}; it is passed over"):
        assert newest_step(tmp_path) == 1
    with pytest.raises(ValueError, match=f"{path} cannot be read"):
        check_checkpoint(path)


def test_a_copy_under_another_name_is_good(tmp_path):
    save(tmp_path, 1)
    shutil.copy(tmp_path / "step=1.ckpt", tmp_path / "best.ckpt")
    assert check_checkpoint(tmp_path / "best.ckpt").step == 1


def test_weights_alone_are_not_resumed_from(tmp_path):
    save(tmp_path, 1)
    weights = {name: value for name, value in content(2).items() if name != "callbacks"}
    ManifestCheckpointIO().save_checkpoint(weights, tmp_path / "weights.ckpt")
    assert newest_step(tmp_path) == 1
    assert newest_checkpoint(tmp_path, resumable=False) == tmp_path / "weights.ckpt"


def test_the_only_good_checkpoint_is_kept(tmp_path, monkeypatch):
    save(tmp_path, 1, 2, 3)
    monkeypatch.setattr("lightning_longnet.checkpointing.commit._written", {})  # as after a restart
    _flip(tmp_path / "step=3.ckpt")
    writer = ManifestCheckpointIO()
    writer.remove_checkpoint(tmp_path / "step=1.ckpt")
    with pytest.warns(RuntimeWarning, match=r"step=2.ckpt is kept: no other checkpoint in its folder is good"):
        writer.remove_checkpoint(tmp_path / "step=2.ckpt")
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=2.ckpt", "step=3.ckpt"]


def test_temporary_ones_are_removed_and_not_resumed_from(tmp_path):
    name = ".lr_find_1.ckpt"  # as Lightning's tuner saves one
    save(tmp_path, 1, name=name)
    assert newest_checkpoint(tmp_path) is None
    ManifestCheckpointIO().remove_checkpoint(tmp_path / name)
    assert not (tmp_path / name).exists()
    save(tmp_path, 1)
    save(tmp_path, 2, name=name)
    with pytest.warns(RuntimeWarning, match="step=1.ckpt is kept"):
        ManifestCheckpointIO().remove_checkpoint(tmp_path / "step=1.ckpt")


def test_one_with_a_slash_in_its_name_is_removed_after_the_next(tmp_path):
    first, second = "epoch=0-val/loss=2-val/acc=1.ckpt", "epoch=1-val/loss=1-val/acc=1.ckpt"
    writer = ManifestCheckpointIO()
    for name in (first, second):
        save(tmp_path, 1, name=name)
    writer.remove_checkpoint(tmp_path / first)
    with pytest.warns(RuntimeWarning, match="acc=1.ckpt is kept"):
        writer.remove_checkpoint(tmp_path / second)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.ckpt")] == [second]


def test_an_error_of_writing_leaves_the_old_one(tmp_path, monkeypatch):
    save(tmp_path, 1, name="last.ckpt")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_longnet.checkpointing.streams.SummedFile.write", full)
    with pytest.raises((OSError, RuntimeError)):
        save(tmp_path, 2, name="last.ckpt")
    assert newest_step(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [INDEX, "last.ckpt"]


def test_the_newest_is_found_without_torch():
    code = (
        "import sys\n"
        "for name in ('torch', 'lightning'): sys.modules[name] = None\n"
        "from lightning_longnet import newest_checkpoint\n"
        "print(newest_checkpoint('.'))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "None", result.stderr


class Line(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.line(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_any_trainer_can_use_it(tmp_path):
    for steps, resume in ((2, None), (4, tmp_path / "step=2.ckpt")):
        saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice
            trainer = L.Trainer(
                accelerator="cpu", max_steps=steps, callbacks=[saving], plugins=ManifestCheckpointIO(), **quiet
            )
            trainer.fit(Line(), torch.utils.data.DataLoader(torch.ones(8, 1), 1), ckpt_path=resume)
    assert newest_checkpoint(tmp_path, reads_all=True) == tmp_path / "step=4.ckpt"
    assert check_checkpoint(tmp_path / "step=4.ckpt").step == 4


# In the background


@pytest.fixture
def gate(monkeypatch):
    """Holds the thread that writes until it is set."""
    gate, write = threading.Event(), SummedFile.write

    def held(self, content):
        assert gate.wait(20)
        return write(self, content)

    monkeypatch.setattr(SummedFile, "write", held)
    return gate


def test_a_save_in_the_background_has_the_values_of_its_time(tmp_path, gate):
    saved, writer = content(1), ManifestCheckpointIO(background=True)
    writer.save_checkpoint(saved, tmp_path / "last.ckpt")
    saved["state_dict"]["x"].fill_(7)
    saved["callbacks"]["late"] = 1
    assert newest_checkpoint(tmp_path) is None
    assert not (tmp_path / INDEX).exists()
    gate.set()
    writer.wait()
    assert newest_step(tmp_path) == 1
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"] == {}


def test_what_is_replaced_is_removed_after_it_is_written(tmp_path, gate):
    gate.set()
    save(tmp_path, 1)
    gate.clear()
    writer = ManifestCheckpointIO(background=True)
    writer.save_checkpoint(content(2), tmp_path / "step=2.ckpt")
    writer.remove_checkpoint(tmp_path / "step=1.ckpt")
    assert newest_step(tmp_path) == 1
    gate.set()
    writer.teardown()
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=2.ckpt"]


def test_an_error_in_the_background_is_raised_by_the_next_save(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    writer = ManifestCheckpointIO(background=True)
    writer.save_checkpoint(content(1), tmp_path / "step=1.ckpt")
    writer.wait()
    with monkeypatch.context() as patched:
        patched.setattr(SummedFile, "write", full)
        writer.save_checkpoint(content(2), tmp_path / "step=2.ckpt")
        with pytest.raises(OSError, match="No space left"):
            writer.save_checkpoint(content(3), tmp_path / "step=3.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [INDEX, "step=1.ckpt"]


def test_what_a_failed_save_was_to_replace_stays(tmp_path, monkeypatch):
    save(tmp_path, 1, 2)
    writer = ManifestCheckpointIO(background=True)
    with monkeypatch.context() as patched:
        patched.setattr("lightning_longnet.checkpointing.checkpoint_io.save_whole", None)
        writer.save_checkpoint(content(3), tmp_path / "step=3.ckpt")
        writer.remove_checkpoint(tmp_path / "step=1.ckpt")
        with pytest.raises(TypeError):
            writer.wait()
    writer.teardown()
    assert (tmp_path / "step=1.ckpt").exists()


# A kill at each operation on files of a save


def overwrite(folder):
    save(folder, 2, name="last.ckpt")


def add(folder):
    save(folder, 2)


def overwrite_in_background(folder):
    writer = ManifestCheckpointIO(background=True)
    writer.save_checkpoint(content(2), folder / "last.ckpt")
    writer.wait()


@pytest.mark.parametrize(
    ("action", "every"),
    tiered([(overwrite, 1), (add, 1), (overwrite_in_background, 1), (overwrite, 5)], quick=[(overwrite, 5)]),
)
def test_a_kill_at_any_operation_leaves_the_old_or_the_new_one(tmp_path, action, every):
    (tmp_path / "counted").mkdir()
    save(tmp_path / "counted", 1, name="last.ckpt")
    operations = counted(tmp_path / "counted", action)
    assert len(operations) >= 8, operations
    steps = []
    for number in [*range(0, len(operations), every), len(operations) - 1]:
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)
        save(folder, 1, name="last.ckpt")
        assert killed_at(folder, number, action)
        steps.append(newest_step(folder))
        assert not [path for path in folder.glob("*.ckpt") if check_checkpoint(path) is None]
    assert set(steps) == {1, 2}
    assert steps == sorted(steps)


def test_what_a_killed_process_left_is_removed_by_the_next_save(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from lightning_longnet.checkpointing import commit\n"
        "path = commit.unfinished_path(Path(sys.argv[1]) / 'last.ckpt')\n"
        "path.mkdir()\n"
        "(path / 'part').write_text('half')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], timeout=60)
    assert len(list(tmp_path.iterdir())) == 1
    save(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [INDEX, "step=1.ckpt"]
