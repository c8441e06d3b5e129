"""`longnet score`: lines of JSON, a plot, and runs that were killed."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from lightning_longnet import LongNet, LongNetConfig, Pattern
from lightning_longnet.checkpointing.checkpoints import write_checkpoint
from lightning_longnet.cli import main
from lightning_longnet.evaluation import half, stream
from lightning_longnet.evaluation import score_files as module

TEXTS = {f"{i}.txt": f"Text {i} \N{EURO SIGN} of {'many ' * i}words.\n" * (i + 1) for i in range(5)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with checkpoints and texts."""
    result = tmp_path_factory.mktemp("scores")
    (result / "texts").mkdir()
    for name, text in TEXTS.items():
        (result / "texts" / name).write_text(text)
    for is_causal in (True, False):
        torch.manual_seed(2)
        pattern = Pattern.dilated((8, 512), (1, 2), is_causal=is_causal)
        model = LongNet(LongNetConfig(pattern, dim=16, layers=2, heads=4))
        write_checkpoint(model, result / ("decoder.ckpt" if is_causal else "encoder.ckpt"))
    return result


def command(folder, *options, kind="decoder"):
    return ["score", f"{folder}/texts", "--checkpoint", f"{folder}/{kind}.ckpt", *options]


def test_a_line_for_each_file(folder, tmp_path, capsys):
    out, plot = tmp_path / "scores.jsonl", tmp_path / "loss.html"
    assert main(command(folder, "--out", str(out), "--plot", str(plot))) == 0
    said = capsys.readouterr()
    assert out.read_text() == said.out
    lines = [*map(json.loads, said.out.splitlines())]
    assert [line["file"] for line in lines] == [f"{folder}/texts/{name}" for name in TEXTS]
    assert [line["predicted_tokens"] for line in lines] == [len(text.encode()) - 1 for text in TEXTS.values()]
    assert all(5 < line["loss"] < 7 for line in lines), "nearly that of chance"
    assert "5 files: 100%" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.html", "scores.jsonl"]
    page = plot.read_text()
    assert page.count("<path") == 5
    assert f"{folder}/texts/3.txt" in page


def test_files_are_scored_in_the_order_of_the_command(folder, capsys):
    names = [f"{folder}/texts/{name}" for name in ("3.txt", "0.txt", "2.txt")]
    assert main(["score", *names, *command(folder)[2:]]) == 0
    assert [json.loads(line)["file"] for line in capsys.readouterr().out.splitlines()] == names
    assert main(["score", names[0], *command(folder)[2:]]) == 0
    assert "1 file: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--documents"]])
def test_a_warning_of_gaps_has_the_length_of_the_text(folder, tmp_path, monkeypatch, options):
    monkeypatch.setattr(stream, "_BLOCK", 512)
    (tmp_path / "long.txt").write_text("word " * 260)
    words = ["score", f"{tmp_path}/long.txt", *command(folder)[2:], *options]
    with pytest.warns(UserWarning, match=r"in a sequence of 1,300: make .* at least 1,300") as result:
        assert main(words) == 0
    assert len([each for each in result if "Nothing crosses" in str(each.message)]) == 1


def test_a_plot_by_matplotlib(folder, tmp_path):
    assert (
        main([*command(folder)[:1], f"{folder}/texts/4.txt", *command(folder, "--plot", f"{tmp_path}/a.png")[2:]]) == 0
    )
    assert (tmp_path / "a.png").stat().st_size > 5000


STANDS_STILL = """
import sys, time
from lightning_longnet.cli import main
from lightning_longnet.evaluation import score_files as module
score_text, texts = module.score_text, []
def stands_still(*args, **options):
    texts.append(args)
    if len(texts) == 3:
        print("stands still", flush=True)
        time.sleep(120)
    return score_text(*args, **options)
module.score_text = stands_still
sys.exit(main(sys.argv[1:]))
"""


def killed(words):
    """Kill the run of a program at its third text."""
    program = [sys.executable, "-c", STANDS_STILL, *words]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process
    with subprocess.Popen(program, env=one_thread, **options) as process:
        try:
            assert "stands still\n" in iter(process.stdout.readline, "")
        finally:
            process.send_signal(signal.SIGKILL)


def interrupted(words):
    """Interrupt a run in this process at its third text."""
    score_text, texts = module.score_text, []

    def stop(*args, **options):
        texts.append(args)
        if len(texts) == 3:
            raise KeyboardInterrupt
        return score_text(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "score_text", stop)
        with pytest.raises(KeyboardInterrupt):
            main(words)


@pytest.mark.parametrize("end", [interrupted, pytest.param(killed, marks=pytest.mark.long)])
def test_a_run_that_is_stopped_goes_on(folder, tmp_path, monkeypatch, capsys, end):
    whole = command(folder, "--out", str(tmp_path / "whole.jsonl"), "--plot", str(tmp_path / "whole.html"))
    assert main(whole) == 0
    expected = capsys.readouterr().out
    words = command(folder, "--out", str(tmp_path / "out.jsonl"), "--plot", str(tmp_path / "out.html"))
    end(words)
    capsys.readouterr()
    assert not (tmp_path / "out.jsonl").exists()
    texts = []
    score_text = module.score_text
    monkeypatch.setattr(module, "score_text", lambda *args, **options: texts.append(1) or score_text(*args, **options))
    assert main([*words, "--documents"]) == 2
    assert "is of a run with other files or options" in capsys.readouterr().err
    assert main(words) == 0
    assert len(texts) == 3
    assert capsys.readouterr().out == expected == (tmp_path / "out.jsonl").read_text()
    assert (tmp_path / "out.html").read_text() == (tmp_path / "whole.html").read_text()


@pytest.mark.parametrize("documents", [[], ["--documents"]])
def test_a_run_goes_on_within_a_text(folder, tmp_path, monkeypatch, capsys, documents):
    monkeypatch.setattr(stream, "_BLOCK", 20)
    monkeypatch.setattr(half, "_SECONDS", 0.0)
    (tmp_path / "text.txt").write_text("Some words of a text\0" * 12)
    words = ["score", f"{tmp_path}/text.txt", "--checkpoint", f"{folder}/decoder.ckpt", *documents]
    assert main([*words, "--plot", f"{tmp_path}/whole.html"]) == 0
    expected = capsys.readouterr().out
    words += ["--out", f"{tmp_path}/out.jsonl", "--plot", f"{tmp_path}/out.html"]
    encode, blocks = stream.TextStates.encode, []

    def counted(self, ids):
        blocks.append(ids)
        if len(blocks) == 6:
            raise KeyboardInterrupt
        return encode(self, ids)

    monkeypatch.setattr(stream.TextStates, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        main(words)
    assert main(words) == 0
    assert len(blocks) == 6 + 13 - 5
    assert capsys.readouterr().out == expected
    assert (tmp_path / "out.html").read_text() == (tmp_path / "whole.html").read_text()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"text.txt", "whole.html", "out.html", "out.jsonl"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "encoder"}, "checkpoint must be of a decoder, whose pattern is causal in every layer"),
        ({"plot": "loss.gif"}, "--plot must be a file .html, .png, .svg, .pdf, got loss.gif"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, options, message):
    plot = ["--plot", options.pop("plot")] if "plot" in options else []
    assert main(command(folder, *plot, **options)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"x", "holds 1")])
def test_a_file_that_is_too_short_is_one_line(folder, tmp_path, capsys, content, message):
    (tmp_path / "short.txt").write_bytes(content)
    words = command(folder)
    assert main([words[0], str(tmp_path / "short.txt"), *words[1:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"each file must hold at least 2 tokens, {tmp_path}/short.txt {message}")
