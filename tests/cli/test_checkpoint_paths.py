"""What `longnet fit` does with a ckpt_path that is damaged or gone, and with a word for one."""

import os
import re
import shutil

import pytest
import torch
from programs import LONGNET, programs
from test_longnet import QUICKSTART, SMALL

from lightning_longnet.supervision.record import RESUME

OURS = "--trainer.strategy=ring_sequence_parallel_ddp"
FSDP2 = "--trainer.strategy=ring_sequence_parallel"
SAVED = [
    *("--trainer.enable_checkpointing=true", "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=run"),
    *("--trainer.callbacks.save_last=true", "--trainer.callbacks.save_top_k=-1"),
    *("--trainer.callbacks.every_n_train_steps=1", "--trainer.callbacks.filename={step}"),
]


def fit(*words):
    return [LONGNET, "fit", QUICKSTART, *SMALL, "--trainer.accelerator=cpu", *words]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run of two steps."""
    path = tmp_path_factory.mktemp("paths")
    ((status, _, errors),) = programs([fit(OURS, *SAVED)], path)
    assert status == 0, errors
    return path


@pytest.mark.long
@pytest.mark.parametrize("is_gone", [False, True])
def test_fit_goes_on_from_another_checkpoint(folder, tmp_path, is_gone):
    shutil.copytree(folder / "run", tmp_path / "run")
    last = tmp_path / "run/last.ckpt"
    last.unlink() if is_gone else os.truncate(last, last.stat().st_size // 2)
    words = [*SAVED, "--trainer.callbacks.dirpath=again", "--trainer.max_steps=3", "--ckpt_path=run/last.ckpt"]
    ((status, _, errors),) = programs([fit(OURS, *words)], tmp_path)
    assert status == 0, errors
    assert sorted(path.name for path in (tmp_path / "again").glob("*.ckpt")) == ["last.ckpt", "step=3.ckpt"]


def test_fit_without_a_good_checkpoint_ends_with_a_line(folder, tmp_path):
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04")
    # a name that was never saved beside good ones is a mistake, not a checkpoint that is gone
    paths = ["cut.ckpt", "no/a.ckpt", folder / "run/lost.ckpt"]
    said_of_each = ("no other good checkpoint", "which does not exist", "which does not exist")
    result = programs([fit(OURS, f"--ckpt_path={path}") for path in paths], tmp_path)
    for (status, _, errors), said in zip(result, said_of_each, strict=True):
        assert status == 2
        assert errors.splitlines()[-1].startswith("longnet: error: ")
        assert said in errors.splitlines()[-1]


OF_ANOTHER = {
    "width of a folder": (FSDP2, "sharded", ["--model.config.dim=32"], r"has config\.dim 16, and this one 32;"),
    "layers of a folder": (FSDP2, "sharded", ["--model.config.layers=2"], r"has config\.layers 1, and this one 2;"),
    "width of a file": (FSDP2, "run", ["--model.config.dim=32"], r"has config\.dim 16, and this one 32;"),
    "rotations": (OURS, "run", ["--model.config.rotary=xpos"], "has rotary rope, and config.rotary is xpos;"),
}


@pytest.mark.long
def test_a_checkpoint_of_another_model_is_named_in_a_line(folder, tmp_path):
    sharded = [fit(FSDP2, *SAVED, "--trainer.callbacks.dirpath=sharded")]
    assert [status for status, *_ in programs(sharded, folder)] == [0]
    commands = [
        fit(strategy, f"--ckpt_path={folder / name / 'last.ckpt'}", *words)
        for strategy, name, words, _ in OF_ANOTHER.values()
    ]
    for (status, _, errors), (_, name, _, said) in zip(programs(commands, tmp_path), OF_ANOTHER.values(), strict=True):
        assert status == 2, errors
        (line,) = [line for line in errors.splitlines() if line.startswith("longnet: error:")]
        assert f"ckpt_path must be a checkpoint of this model, got {folder / name / 'last.ckpt'}: " in line
        assert re.search(said, line), line
        assert line.endswith(
            "; give the model the values that the checkpoint has, or leave ckpt_path out to begin anew"
        )


@pytest.mark.long
def test_a_restarted_fit_needs_no_ckpt_path(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    restarted = tmp_path / "restarted.py"
    restarted.write_text(
        f"import os, runpy\nos.environ[{RESUME!r}] = 'last'\nrunpy.run_path({str(LONGNET)!r}, run_name='__main__')\n"
    )
    ((status, _, errors),) = programs([[restarted, *fit(OURS, *SAVED, "--ckpt_path=no/a.ckpt")[1:]]], tmp_path)
    assert status == 0, errors


@pytest.mark.long
def test_a_word_names_no_folder_that_holds_code(tmp_path):
    (tmp_path / "hpc_ckpt_1.ckpt").mkdir()
    torch.save(torch.nn.Linear(1, 1), tmp_path / "hpc_ckpt_1.ckpt/meta.pt")
    words = [QUICKSTART, *SMALL, "--ckpt_path=hpc", "--trainer.default_root_dir=."]
    for status, _, errors in programs([[LONGNET, command, *words] for command in ("fit", "validate")], tmp_path):
        assert status == 2
        assert "could run any code" in errors.splitlines()[-1]
