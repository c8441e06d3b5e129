"""The front of the command line: short helps, completion by shells, and progress."""

import dataclasses
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_longnet
from lightning_longnet import LongNet, LongNetConfig, LongNetModule, Pattern
from lightning_longnet.checkpointing.checkpoints import write_checkpoint
from lightning_longnet.cli import COMMANDS, TRAINER_COMMANDS, main
from lightning_longnet.cli.brief import brief_help, groups
from lightning_longnet.cli.options import commands
from lightning_longnet.cli.progress import bar, size, steps, written
from lightning_longnet.cli.shells import SHELLS, bash

ROOT = Path(__file__).parents[2]


def run(*words):
    command = [sys.executable, "-X", "importtime", "-m", "lightning_longnet", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.fixture(scope="module")
def shown():
    return {command.name: command for command in commands()}


@pytest.mark.parametrize("name", TRAINER_COMMANDS)
def test_a_help_is_short(name, capsys):
    assert main([name, "--config", "some.yaml", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith(f"usage: longnet {name} --config FILE")
    assert any(line.startswith(f"  longnet {name} --config") for line in lines), "an example to copy"
    assert any(f"longnet {name} --help-all" in line for line in lines)


def test_a_short_help_imports_neither_torch_nor_lightning():
    result = run("fit", "--help")
    assert result.returncode == 0
    imported = {
        line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")
    }
    assert "lightning_longnet.cli.brief" in imported
    assert not imported & {"torch", "lightning", "jsonargparse", "numpy"}


@pytest.mark.parametrize("name", TRAINER_COMMANDS)
def test_a_short_help_names_options_that_there_are(name, shown):
    known = {option.name for option in shown[name].options} | {"--trainer.callbacks+"}
    listed = {option.name for options in groups(name).values() for option in options}
    also = set(re.findall(r"--[a-z]+\.[a-z_]+(?:\.[a-z_]+)?", brief_help(name))) - {"--model.help", "--data.help"}
    assert (listed | also) - known == set()
    assert {"--config", "--ckpt_path"} < listed


def test_examples_of_a_short_help_are_commands_that_parse(monkeypatch):
    """Options of examples are among those that are listed."""
    for name in TRAINER_COMMANDS:
        for line in brief_help(name).splitlines():
            if line.startswith(f"  longnet {name} "):
                for option in re.findall(r"--[a-z_.]+", line.partition("#")[0]):
                    known = {each.name for options in groups(name).values() for each in options}
                    known |= {"--model.config.layers", "--data.pattern"}
                    assert option in known, line


@pytest.mark.full
def test_all_options_are_printed_on_demand():
    result = run("fit", "--help-all")
    assert result.returncode == 0
    assert "usage: longnet [options] fit" in result.stdout
    assert len(result.stdout.splitlines()) > 300
    assert "--trainer.reload_dataloaders_every_n_epochs" in result.stdout


def test_something_is_said_before_torch_is_loaded(monkeypatch, capsys):
    """And by one process only: ranks that a launcher starts have LOCAL_RANK."""
    said = []
    monkeypatch.setattr("lightning_longnet.cli.trainer.run_trainer", lambda words: said.append(capsys.readouterr().err))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert main(["fit", "--config", "some.yaml"]) == 0
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["fit", "--config", "some.yaml"]) == 0
    assert said == ["longnet: loading torch and Lightning\n", ""]


def test_a_command_without_its_words_shows_what_to_type(capsys):
    for name in COMMANDS:
        if name == "doctor":  # needs none
            continue
        try:
            status = main([name])
        except SystemExit as ended:
            status = ended.code
        (line,) = capsys.readouterr().err.splitlines()
        assert status == 2
        assert re.search(rf": longnet {name} \S+", line), line


def completed(script, *words):
    """What bash completes the last of the words to."""
    program = f'{script}\nCOMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); _longnet; printf "%s\\n" "${{COMPREPLY[@]}}"\n'
    result = subprocess.run(
        ["bash", "-c", program, "bash", "longnet", *words], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_bash_completes(shown, tmp_path):
    script = bash([*shown.values()])
    assert completed(script, "") == [*TRAINER_COMMANDS, *COMMANDS]
    assert completed(script, "pre") == ["predict"]
    assert completed(script, "fit", "--trainer.max_s") == ["--trainer.max_steps"]
    assert completed(script, "fit", "--model.config.seg") == []
    assert completed(script, "fit", "--model.config.feed") == ["--model.config.feed_forward_chunk"]
    assert completed(script, "fit", "--trainer.strategy", "ring_sequence_parallel_h") == ["ring_sequence_parallel_hsdp"]
    assert completed(script, "fit", "--trainer.strategy", "=", "ring_sequence_parallel_h") == [
        "ring_sequence_parallel_hsdp"
    ]
    assert completed(script, "fit", "--data", "lightning_longnet.By") == ["lightning_longnet.ByteData"]
    assert completed(script, "plan", "--model.config.di") == ["--model.config.dim"]
    assert completed(script, "export", "a.ckpt", "b", "--format", "") == ["safetensors", "huggingface"]
    assert completed(script, "completion", "") == ["bash", "zsh", "fish"]
    (tmp_path / "my run.yaml").touch()
    assert completed(script, "fit", "--config", f"{tmp_path}/my")[:1] == [f"{tmp_path}/my"]


def test_the_options_are_those_of_the_classes(shown):
    names = {option.name for option in shown["fit"].options}
    assert {f"--model.config.{field.name}" for field in dataclasses.fields(LongNetConfig)} <= names
    assert {f"--model.{name}" for name in inspect.signature(LongNetModule).parameters} <= names
    assert {f"--data.{name}" for name in inspect.signature(lightning_longnet.TokenFileData).parameters} <= names
    assert {"--ckpt_path", "--trainer.max_steps", "--help-all"} <= names


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_of_all_shells_name_everything(shell, shown):
    script = SHELLS[shell]([*shown.values()])
    for command in shown.values():
        assert command.name in script
        for option in command.options:
            assert option.name.removeprefix("--") in script
    program = shutil.which(shell)
    if program is not None:
        assert subprocess.run([program, "-n"], input=script, text=True, timeout=60).returncode == 0


def test_completion_prints_the_script(capsys, shown):
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == bash([*shown.values()])


def test_progress_shows_the_time_that_is_left(monkeypatch, capsys):
    monkeypatch.setattr("lightning_longnet.cli.progress._DELAY", 0.0)
    monkeypatch.setattr("lightning_longnet.cli.progress._LINES", 0.0)
    with bar(10, "generating", "token") as progress:
        progress.update(5)
        progress.refresh()
    assert re.search(r"generating: +50%.* 5/10 \[00:00<00:00", capsys.readouterr().err)
    with steps("planning") as report:
        for done in range(3):
            report(done, 3)
    assert re.search(r"planning: +67%.* 2/3 \[", capsys.readouterr().err)


def test_progress_follows_files(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("lightning_longnet.cli.progress._DELAY", 0.0)
    monkeypatch.setattr("lightning_longnet.cli.progress._LINES", 0.0)
    monkeypatch.setattr("lightning_longnet.cli.progress._LOOKS", 0.01)
    from time import sleep

    with written(tmp_path / "out", 4096, "writing"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/weights").write_bytes(bytes(2048))
        sleep(0.2)
    assert size(tmp_path / "out") == 2048
    assert size(tmp_path / "nothing") == 0
    assert re.search(r"writing: +50%.* 2\.00k/4\.00k", capsys.readouterr().err)


def test_long_commands_show_their_progress(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("lightning_longnet.cli.progress._DELAY", 0.0)
    monkeypatch.setattr("lightning_longnet.cli.progress._LINES", 0.0)
    config = LongNetConfig(Pattern.window(8, is_causal=True), dim=16, layers=1, heads=4)
    write_checkpoint(LongNet(config), tmp_path / "a.ckpt")
    assert main(["generate", f"{tmp_path}/a.ckpt", "--prompt=def ", "--tokens=3"]) == 0
    assert re.search(r"generating: +67%.* 2/3 \[", capsys.readouterr().err)
    assert main(["export", f"{tmp_path}/a.ckpt", f"{tmp_path}/exported"]) == 0
    assert f"writing {tmp_path}/exported:" in capsys.readouterr().err
