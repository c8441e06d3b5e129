"""`longnet needle`: checkpoints of each kind, its table and files, and runs that were killed."""

import json
import sys

import pytest
import torch
from copying_models import copier

from lightning_longnet import LongNet, LongNetConfig, Pattern
from lightning_longnet.checkpointing.checkpoints import write_checkpoint
from lightning_longnet.cli import main
from lightning_longnet.data.tokenizers import ByteTokenizer
from lightning_longnet.evaluation import needle_files
from lightning_longnet.evaluation.decoders import loaded_decoder

pytestmark = pytest.mark.filterwarnings("ignore:Nothing crosses", "ignore:In the branch")
GRID = ("--lengths", "150", "400", "--depths", "0", "1", "--samples", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a copying model whose window is 140 tokens, a LongNet, and an encoder."""
    result = tmp_path_factory.mktemp("needles")
    copier(12, window=140).save_pretrained(result / "windowed")
    ByteTokenizer().save(result / "windowed")
    for is_causal in (True, False):
        torch.manual_seed(2)
        pattern = Pattern.dilated((64, 256), (1, 2), is_causal=is_causal)
        model = LongNet(LongNetConfig(pattern, dim=16, layers=2, heads=4))
        write_checkpoint(model, result / ("decoder.ckpt" if is_causal else "encoder.ckpt"))
    return result


def test_a_model_of_transformers_gets_a_table_lines_and_a_heat_map(folder, tmp_path, capsys):
    out, plot = tmp_path / "needle.jsonl", tmp_path / "new" / "needle.png"
    options = (*GRID, "--dtype", "float64", "--out", str(out), "--plot", str(plot))
    assert main(["needle", str(folder / "windowed"), *options]) == 0
    shown = capsys.readouterr().out
    assert shown == "depth   150   400\n   0%  100%    0%\n 100%  100%  100%\nright answers of 1 row each\n"
    lines = [*map(json.loads, out.read_text().splitlines())]
    cells = [(line["length"], line["depth"], line["accuracy"]) for line in lines]
    assert cells == [(150, 0, 1), (150, 1, 1), (400, 0, 0), (400, 1, 1)]
    assert lines[0]["loss"] < 1 < 5 < lines[2]["loss"]
    assert (lines[0]["samples"], lines[0]["chance"]) == (1, 1e-5)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["needle.jsonl", "new"]


def test_a_longnet_is_asked_for_tokens_as_well(folder, capsys):
    assert main(["needle", str(folder / "decoder.ckpt"), *GRID]) == 0
    assert capsys.readouterr().out.endswith("right answers of 1 row each\n")
    assert main(["needle", str(folder / "decoder.ckpt"), "--task", "tokens", *GRID]) == 0
    assert capsys.readouterr().out.endswith("right answers of 1 row each, 12.5% by chance\n")


def test_a_checkpoint_of_a_causal_lm_module_is_read(folder, tmp_path):
    """As the folder of the same model is, with the tokenizer of its training; dense layers may be computed by SDPA."""
    import lightning as L
    from lightning.pytorch.plugins.environments import LightningEnvironment

    from lightning_longnet import CausalLMModule

    module = CausalLMModule(name=str(folder / "windowed"), dtype="float64")
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, plugins=[LightningEnvironment()], barebones=False
    )
    trainer.strategy.connect(module)
    module.hparams["tokenizer"] = "bytes"
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    row = torch.randint(1, 256, (1, 300))
    expected = loaded_decoder(str(folder / "windowed"), dtype="float64")
    for attention in ("ring", "sdpa"):
        source = loaded_decoder(str(tmp_path / "last.ckpt"), dtype="float64", attention=attention)
        assert source.tokenizer().name == "bytes"
        assert source.model.config._attn_implementation == attention
        with torch.no_grad():
            torch.testing.assert_close(source.model(row).logits, expected.model(row).logits)


def test_a_run_goes_on_where_it_was_killed(folder, tmp_path, monkeypatch):
    words = ["needle", str(folder / "decoder.ckpt"), *GRID, "--task", "tokens", "--out"]
    assert main([*words, str(tmp_path / "whole.jsonl")]) == 0
    compute, calls = needle_files.needle_cell, []

    def killed_at(count):
        def cell(*arguments, **options):
            calls.append(arguments[2:])
            if len(calls) == count:
                raise KeyboardInterrupt
            return compute(*arguments, **options)

        return cell

    monkeypatch.setattr(needle_files, "needle_cell", killed_at(3))
    with pytest.raises(KeyboardInterrupt):
        main([*words, str(tmp_path / "needle.jsonl")])
    assert not (tmp_path / "needle.jsonl").exists()
    calls.clear()
    monkeypatch.setattr(needle_files, "needle_cell", killed_at(9))
    assert main([*words, str(tmp_path / "needle.jsonl")]) == 0
    assert calls == [(400, 0.0), (400, 1.0)]
    assert (tmp_path / "needle.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.ckpt"], "path must be a checkpoint, got nothing.ckpt, which does not exist"),
        (["encoder.ckpt"], "got an encoder"),
        (["decoder.ckpt", "--lengths", "9"], "lengths must be at least 6"),
        (["decoder.ckpt", "--plot", "heat.html"], "--plot must be a file .png, .svg, .pdf, got heat.html"),
        (["decoder.ckpt", "--task", "tokens", "--haystack", "book"], "--haystack is of --task text, got --task tokens"),
        (["decoder.ckpt", "--haystack", "encoder.ckpt"], "--haystack must hold text in UTF-8, encoder.ckpt does not"),
        (["windowed", "--tokenizer", "broken"], "tokenizer must be 'bytes', the name of a Hugging Face tokenizer"),
        (["broken"], "config.json is no JSON"),
        (["decoder.ckpt", "--dtype", "float8"], "invalid choice: 'float8'"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, monkeypatch, capsys, words, message):
    (folder / "broken").mkdir(exist_ok=True)
    (folder / "broken" / "config.json").write_text("{")
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "matplotlib", None) if "heat" in words[-1] else None
    try:
        status = main(["needle", *words])
    except SystemExit as ended:
        status = ended.code
    shown = capsys.readouterr().err
    assert status == 2
    (line,) = [line for line in shown.splitlines() if line.startswith("longnet: error:")]
    assert message in line
    assert "Traceback" not in shown


@pytest.mark.parametrize("words", [("needle", "none.ckpt"), ("lm_eval", "--tasks", "none")])
def test_commands_of_one_process_are_refused_under_torchrun(words, monkeypatch, capsys):
    places = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**places, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main([*words]) == 2
    assert f"longnet {words[0]} runs in one process: start it without torchrun" in capsys.readouterr().err
