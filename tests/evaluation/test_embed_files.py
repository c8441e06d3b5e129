"""`longnet embed`: files of embeddings, whole or absent, also of runs that were killed."""

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from itertools import product

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiers import tiered

from lightning_longnet import LongNet, LongNetConfig, LongViT, LongViTConfig, Pattern, load_model
from lightning_longnet.checkpointing.checkpoints import write_checkpoint
from lightning_longnet.cli import main
from lightning_longnet.evaluation import stream
from lightning_longnet.evaluation.state_files import StateFile
from lightning_longnet.models.embedding import embed

PATTERNS = {"encoder": Pattern.dilated((8, 512), (1, 2)), "decoder": Pattern.dilated((8, 512), (1, 2), is_causal=True)}
TEXTS = {f"{i:02}.txt": f"Text {i} \N{EURO SIGN} of {'many ' * i}words.\n" * (i + 1) for i in range(6)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with checkpoints and texts."""
    result = tmp_path_factory.mktemp("embedding")
    (result / "texts").mkdir()
    for name, text in TEXTS.items():
        (result / "texts" / name).write_text(text)
    for kind, pattern in PATTERNS.items():
        torch.manual_seed(2)
        write_checkpoint(LongNet(LongNetConfig(pattern, dim=16, layers=2, heads=4)), result / f"{kind}.ckpt")
    images = LongViTConfig(PATTERNS["encoder"], image_size=8, patch_size=4, dim=16, layers=1, heads=4)
    write_checkpoint(LongViT(images), result / "images.ckpt")
    return result


def command(folder, out, kind="encoder", *options):
    return ["embed", f"{folder}/texts", "--checkpoint", f"{folder}/{kind}.ckpt", "--out", str(out), *options]


def expected(folder, kind, pooling, dtype=torch.float32):
    net = load_model(folder / f"{kind}.ckpt").to(dtype)
    return [embed(net, torch.tensor([[*text.encode()]]), pooling)[0] for text in TEXTS.values()]


def test_rows_have_the_order_of_the_command(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stream, "_BLOCK", 512)
    names = [f"{folder}/texts/{name}" for name in ("03.txt", "00.txt")]
    (tmp_path / "long.txt").write_text("word " * 260)
    words = ["embed", *names, f"{tmp_path}/long.txt", *command(folder, tmp_path / "out.safetensors", "decoder")[2:]]
    with pytest.warns(UserWarning, match=r"in a sequence of 1,300: make .* at least 1,300"):
        assert main(words) == 0
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert json.loads(file.metadata()["files"]) == [*names, f"{tmp_path}/long.txt"]
    assert main(["embed", names[0], *command(folder, tmp_path / "one.safetensors")[2:]]) == 0
    assert "one.safetensors: 1 text of " in capsys.readouterr().out


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_row_for_each_text(folder, tmp_path, capsys, kind, pooling):
    out = tmp_path / "new/out.safetensors"
    assert main(command(folder, out, kind, "--pooling", pooling, "--dtype", "float64")) == 0
    tensors = load_file(out)
    assert tensors["tokens"].tolist() == [len(text.encode()) for text in TEXTS.values()]
    right = torch.stack(expected(folder, kind, pooling, torch.float64))
    torch.testing.assert_close(tensors["embeddings"], right, rtol=1e-9, atol=1e-9)
    with safe_open(out, "pt") as file:
        about = file.metadata()
    assert json.loads(about["files"]) == [f"{folder}/texts/{name}" for name in TEXTS]
    assert (about["pooling"], about["tokenizer"]) == (pooling, "bytes")
    assert [path.name for path in out.parent.iterdir()] == ["out.safetensors"]
    said = capsys.readouterr()
    assert "6 texts of" in said.out
    assert "6 files: 100%" in said.err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_states_of_all_tokens(folder, tmp_path, dtype):
    out = tmp_path / "out.safetensors"
    assert main(command(folder, out, "decoder", "--pooling", "tokens", "--dtype", dtype)) == 0
    tensors = load_file(out)
    assert [*tensors] == sorted(f"{folder}/texts/{name}" for name in TEXTS)
    for name, states in zip(TEXTS, expected(folder, "decoder", "tokens", getattr(torch, dtype)), strict=True):
        torch.testing.assert_close(tensors[f"{folder}/texts/{name}"], states)


STANDS_STILL = """
import sys, time
from lightning_longnet.cli import main
from lightning_longnet.evaluation.state_files import StateFile
append, rows = StateFile.append, []
def stands_still(self, x):
    append(self, x)
    rows.append(x)
    if len(rows) == 4:  # a text that the journal does not name yet
        self.sync()
        print("stands still", flush=True)
        time.sleep(120)
StateFile.append = stands_still
sys.exit(main(sys.argv[1:]))
"""


def killed(words):
    """Kill the run of a program at its fourth text."""
    program = [sys.executable, "-c", STANDS_STILL, *words]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process
    with subprocess.Popen(program, env=one_thread, **options) as process:
        try:
            assert process.stdout.readline() == "stands still\n"
        finally:
            process.send_signal(signal.SIGKILL)


def interrupted(words):
    """Interrupt a run in this process at its fourth text."""
    append, rows = StateFile.append, []

    def stop(self, x):
        append(self, x)
        rows.append(x)
        if len(rows) == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateFile, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            main(words)


@pytest.mark.parametrize(
    ("end", "pooling"),
    tiered(
        product([interrupted, killed], ["mean", "tokens"]),
        quick=[(interrupted, "mean"), (interrupted, "tokens")],
        long=[(killed, "tokens")],
    ),
)
def test_a_run_that_is_stopped_goes_on(folder, tmp_path, monkeypatch, capsys, pooling, end):
    words = command(folder, tmp_path / "out.safetensors", "encoder", "--pooling", pooling)
    end(words)
    assert not (tmp_path / "out.safetensors").exists()
    with (tmp_path / "out.safetensors.unfinished").open("a") as journal:
        journal.write('{"tok')  # a line that was cut off
    assert main([*words, "--dtype", "float64"]) == 2
    assert "is of a run with other files or options" in capsys.readouterr().err
    texts = []
    encode = LongNet.encode
    monkeypatch.setattr(LongNet, "encode", lambda *args, **options: texts.append(1) or encode(*args, **options))
    assert main(words) == 0
    assert len(texts) == 3
    monkeypatch.undo()
    assert main(command(folder, tmp_path / "whole.safetensors", "encoder", "--pooling", pooling)) == 0
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "whole.safetensors"]
    assert main(words) == 2
    assert "--out must be a new file" in capsys.readouterr().err


def test_hdf5(folder, tmp_path, capsys):
    out = tmp_path / "out.h5"
    words = command(folder, out, "encoder", "--pooling", "tokens", "--format", "hdf5", "--dtype", "bfloat16")
    if find_spec("h5py") is None:
        assert main(words) == 2
        assert capsys.readouterr().err.endswith(
            "longnet: error: --format hdf5 needs h5py, which is not installed: pip install 'lightning-longnet[hdf5]'\n"
        )
        assert [*tmp_path.iterdir()] == []
        return
    import h5py

    assert main(words) == 0
    with h5py.File(out) as file:
        assert file.attrs["pooling"] == "tokens"
        for name, states in zip(TEXTS, expected(folder, "encoder", "tokens", torch.bfloat16), strict=True):
            torch.testing.assert_close(torch.tensor(file[f"{folder}/texts/{name}"][:]), states.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--checkpoint", "images.ckpt"], "checkpoint must be of a model of tokens, a LongNet, got a LongViT"),
        (["--device", "cuda:77"], "device must be one that torch finds here, got 'cuda:77'"),
        (["--checkpoint", "no.ckpt"], "path must be a checkpoint, got no.ckpt, which does not exist"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.chdir(folder)
    assert main([*command(folder, tmp_path / "out.safetensors"), *change]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert [*tmp_path.iterdir()] == []


def test_an_empty_file_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    words = command(folder, tmp_path / "out.safetensors")
    assert main([*words[:2], str(tmp_path / "empty.txt"), *words[2:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "each file must hold at least a token" in line
    assert line.endswith("empty.txt is empty")
