"""`longnet init`, as a newcomer calls it."""

import re
from pathlib import Path

import pytest
import yaml

from lightning_longnet.cli import COMMANDS, main
from lightning_longnet.cli.init import content

ROOT = Path(__file__).parents[2]


def test_a_configuration_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "a first/run"]) == 0
    shown = capsys.readouterr().out
    written = (tmp_path / "a first/run/quickstart.yaml").read_text()
    assert yaml.safe_load(written)["trainer"]["strategy"] == "ring_sequence_parallel"
    assert "configs/" not in written
    assert "\n#   longnet fit --config quickstart.yaml\n" in written
    assert shown.splitlines()[:3] == ["Wrote a first/run/quickstart.yaml.", "Next:", "  cd 'a first/run'"], (
        "to be pasted"
    )
    commands = re.findall(r"longnet (\w+)[^#\n]*", shown)
    assert len(commands) == 3
    assert set(commands) <= {"fit", *COMMANDS}


def test_it_is_the_one_of_the_checkout():
    assert content() == (ROOT / "configs/quickstart.yaml").read_text().replace("configs/quickstart", "quickstart")


@pytest.mark.parametrize(
    ("folder", "message"), [("there", "folder must have no quickstart.yaml"), ("file", "file, which is a file")]
)
def test_nothing_is_overwritten(tmp_path, capsys, monkeypatch, folder, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/quickstart.yaml").write_text("mine")
    (tmp_path / "file").write_text("mine")
    assert main(["init", folder]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("longnet: error: ")
    assert message in said.err
    assert said.out == ""
    assert (tmp_path / "there/quickstart.yaml").read_text() == (tmp_path / "file").read_text() == "mine"


def test_the_folder_may_be_this_one(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "."]) == 0
    assert "cd " not in capsys.readouterr().out
    assert (tmp_path / "quickstart.yaml").exists()
