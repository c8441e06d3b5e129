"""Each data module is made of YAML, and every argument of it says in the help what it is."""

import inspect

import lightning as L
import pytest
from jsonargparse import ArgumentParser

import lightning_longnet

NAMES = ["ByteData", "HubData", "ImageFolderData", "LongRangeData", "TokenFileData"]


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_documented(name):
    kind = getattr(lightning_longnet, name)
    documented = inspect.getdoc(kind).split("Args:")[1]
    named = list(inspect.signature(kind).parameters)
    result = [
        line.strip().split(":")[0] for line in documented.splitlines() if line.startswith("    ") and line[4] != " "
    ]
    assert result == named


def test_from_yaml(tmp_path):
    (tmp_path / "data.yaml").write_text(
        "data:\n"
        "  class_path: lightning_longnet.LongRangeData\n"
        "  init_args: {task: copy, tokens: 64, distance: 20, batch_size: 2}\n"
    )
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    result = parser.parse_args(["--config", str(tmp_path / "data.yaml"), "--data.items", "4", "--data.seed", "7"])
    data = parser.instantiate(result).data
    assert type(data) is lightning_longnet.LongRangeData
    assert (data.task, data.items, data.seed, data.batch_size) == ("copy", 4, 7, 2)
    result = parser.parse_args(["--data", "lightning_longnet.ByteData", "--data.paths", "[a.txt, b]"])
    assert parser.instantiate(result).data.paths == ["a.txt", "b"]
