"""`longnet generate`: prompts from anywhere, text that appears as it comes, and conversations."""

import builtins
import io
import re
import sys

import pytest
import torch

from lightning_longnet import LongNet, LongNetConfig, Pattern
from lightning_longnet.checkpointing.checkpoints import write_checkpoint
from lightning_longnet.checkpointing.exports import load_model
from lightning_longnet.cli import main
from lightning_longnet.data.tokenizers import ByteTokenizer

CONFIG = LongNetConfig(Pattern.dilated((64, 256), (1, 2), is_causal=True), dim=16, layers=2, heads=4)
ENCODER = LongNetConfig(Pattern.dilated((64,), (1,)), dim=16, layers=1, heads=4)
CURVE = LongNetConfig(Pattern.dilated((64,), (1,), True), dim=16, layers=1, heads=4, ordering="hilbert")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(2)
    for name, config in (("a", CONFIG), ("encoder", ENCODER), ("curve", CURVE)):
        net = LongNet(config)
        torch.nn.init.normal_(net.embedding.weight)
        write_checkpoint(net, made / f"{name}.ckpt")
    (made / "prompt.txt").write_text("def f(\N{EURO SIGN}):")
    return made


@pytest.fixture
def generated(folder, capsys, monkeypatch):
    """A function that runs the command, and returns its status, stdout and stderr."""
    monkeypatch.chdir(folder)

    def run(*words, name="a"):
        status = main(["generate", f"{name}.ckpt", *words])
        return status, *capsys.readouterr()

    return run


def test_prompts_come_from_words_files_and_the_standard_input(generated, monkeypatch):
    text = "def f(\N{EURO SIGN}):"
    status, expected, said = generated(f"--prompt={text}", "--tokens=9", "--top-p=0.9")
    assert status == 0
    assert expected.startswith(text)
    assert len(expected) > len(text)
    assert re.fullmatch(r"longnet: 9 tokens, [\d,]+ tokens/s; 11 of the prompt in \d+\.\d\d s", said.splitlines()[-1])
    assert generated("--prompt-file=prompt.txt", "--tokens=9", "--top-p=0.9")[1] == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert generated("--prompt-file=-", "--tokens=9", "--top-p=0.9")[1] == expected
    assert (
        generated(f"--prompt={text}", "--tokens=9", "--min-p=0.3", "--repetition-penalty=2", "--seed=5")[1] != expected
    )
    assert generated(f"--prompt={text}", "--tokens=9", "--cache=int8")[0] == 0


def test_a_text_ends_before_a_stop_text(generated):
    _, whole, _ = generated("--prompt=abc", "--tokens=60", "--temperature=0.5")
    stop = next(whole[i] for i in range(20, len(whole)) if whole[i] not in whole[:i] and whole[i].isprintable())
    _, result, said = generated("--prompt=abc", "--tokens=60", "--temperature=0.5", f"--stop={stop}", "--stop=zzz")
    assert result == whole[: whole.index(stop)] + "\n"
    assert "longnet: 60 tokens" not in said


def test_a_conversation_goes_on_with_what_was_said(generated, monkeypatch):
    lines = iter(["hello", "and?"])

    def typed(prompt):
        sys.stdout.write(prompt)
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr(builtins, "input", typed)
    for each in (sys.stdin, sys.stdout):
        monkeypatch.setattr(each, "isatty", lambda: True, raising=False)
    status, said, _ = generated("--chat", "--tokens=8", "--temperature=0")
    assert status == 0
    first, second = re.fullmatch(r"> (.*)\n> (.*)\n> ", said, flags=re.DOTALL).groups()
    net, tokenizer, text = load_model("a.ckpt"), ByteTokenizer(), []
    for line, answer in (("hello", first), ("and?", second)):
        text += tokenizer.encode(f"{line}\n")
        further = net.generate(torch.tensor([text]), 8, temperature=0)[0, len(text) :].tolist()
        assert answer == tokenizer.decode(further)
        text += further


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("a", ["--chat"], "--chat needs a terminal"),
        ("a", ["--stop="], "stops must be texts of at least one character"),
        ("a", ["--temperature=-1"], "temperature must be 0 or more, got -1.0"),
        ("a", ["--top-p=2"], "top_p must be more than 0 and at most 1, got 2.0"),
        ("a", ["--prompt="], "--prompt must hold at least one token, got an empty text"),
        ("encoder", [], "model must be causal in every layer"),
        ("curve", ["--cache=int8"], "--cache is of models that have a cache"),
    ],
)
def test_refusals(generated, name, words, message):
    status, shown, said = generated("--prompt=abc", *words, "--tokens=2", name=name)
    assert (status, shown) == (2, "")
    assert said.splitlines()[-1].startswith("longnet: error:")
    assert message in said
