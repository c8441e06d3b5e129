"""`save_pretrained` at the end of a run, and again at the end of the run that goes on from it."""

import json

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_longnet import CausalLMModule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
CONFIG = {
    **{"model_type": "qwen3", "vocab_size": 61, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
}


class Export(L.Callback):
    """Writes the model for transformers when training ends."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        module.save_pretrained(self.folder)


def fitted(folder, steps, ckpt_path=None):
    """Return the module of a run that saves `last.ckpt` and writes `out` in a folder."""
    ids = torch.arange(16) % 61
    rows = DataLoader([{"input_ids": ids, "labels": ids.roll(-1)}] * 8, batch_size=2)
    module = CausalLMModule(config=CONFIG, learning_rate=0.1, warmup_steps=1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Export(folder / "out")],
    )
    trainer.fit(module, rows, ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module


def head_of(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).get_output_embeddings().weight


def test_a_resumed_run_replaces_its_own_export_alone(tmp_path):
    first = fitted(tmp_path, 1)
    assert torch.equal(head_of(tmp_path / "out"), first.model.get_output_embeddings().weight)
    (tmp_path / "out/tokenizer.json").write_text("added later")
    second = fitted(tmp_path, 2, tmp_path / "last.ckpt")
    result = head_of(tmp_path / "out")
    assert torch.equal(result, second.model.get_output_embeddings().weight)
    assert not torch.equal(result, first.model.get_output_embeddings().weight)
    assert (tmp_path / "out/tokenizer.json").read_text() == "added later"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "out"], "nothing is left beside it"
    with pytest.raises(ValueError, match=r"folder must be new or empty, or written by this run, got .*out"):
        fitted(tmp_path, 1)  # another run
    assert torch.equal(head_of(tmp_path / "out"), result)


def test_a_write_that_fails_leaves_the_export_as_it_was(tmp_path, monkeypatch):
    fitted(tmp_path, 1)
    before = head_of(tmp_path / "out").clone()

    def fails(model, folder):
        (folder / "config.json").write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fails)
    with pytest.raises(OSError, match="no space left"):
        fitted(tmp_path, 2, tmp_path / "last.ckpt")
    monkeypatch.undo()
    assert torch.equal(head_of(tmp_path / "out"), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "out"]


def test_a_folder_of_others_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="folder must be new or empty"):
        fitted(tmp_path, 1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_filled_and_stays_the_same_folder(tmp_path):
    """It may be a mount, which no other folder can take the place of."""
    (tmp_path / "out").mkdir()
    before = (tmp_path / "out").stat().st_ino
    module = fitted(tmp_path, 1)
    assert (tmp_path / "out").stat().st_ino == before
    assert torch.equal(head_of(tmp_path / "out"), module.model.get_output_embeddings().weight)
    fitted(tmp_path, 2, tmp_path / "last.ckpt")  # the run still knows its export


def test_runs_that_go_on_from_one_checkpoint_keep_to_their_own_exports(tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "LIGHTNING_LONGNET_SUPERVISION"):
        monkeypatch.delenv(name, raising=False)
    fitted(tmp_path, 1)
    first = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "first.ckpt").write_bytes(first)
    fitted(tmp_path, 2, tmp_path / "first.ckpt")
    before = head_of(tmp_path / "out").clone()
    with pytest.raises(ValueError, match="folder must be new or empty, or written by this run"):
        fitted(tmp_path, 3, tmp_path / "first.ckpt")  # another run from the same checkpoint
    assert torch.equal(head_of(tmp_path / "out"), before)
    fitted(tmp_path, 3, tmp_path / "last.ckpt")  # the one that wrote the export goes on
    assert not torch.equal(head_of(tmp_path / "out"), before)


def test_a_job_that_begins_again_replaces_its_export(tmp_path, monkeypatch):
    fitted(tmp_path, 1)
    (tmp_path / "first.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes())
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    fitted(tmp_path, 2, tmp_path / "first.ckpt")
    again = fitted(tmp_path, 2, tmp_path / "first.ckpt")  # requeued, as no checkpoint was saved in between
    assert torch.equal(head_of(tmp_path / "out"), again.model.get_output_embeddings().weight)
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    with pytest.raises(ValueError, match="folder must be new or empty"):
        fitted(tmp_path, 2, tmp_path / "first.ckpt")


def test_a_changed_generation_config_is_kept(tmp_path):
    fitted(tmp_path, 1)
    path = tmp_path / "out/generation_config.json"
    values = {**json.loads(path.read_text()), "temperature": 0.25, "do_sample": True}
    path.write_text(json.dumps(values))
    for steps in (2, 3):  # it stays a file that the user changed
        fitted(tmp_path, steps, tmp_path / "last.ckpt")
        assert json.loads(path.read_text()) == values
    path.unlink()
    fitted(tmp_path, 4, tmp_path / "last.ckpt")
    assert "temperature" not in json.loads(path.read_text())
