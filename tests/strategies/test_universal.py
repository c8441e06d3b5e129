"""The process that converts checkpoints of DeepSpeed: what goes wrong is returned, so that all ranks raise it."""

import subprocess

import pytest

from lightning_longnet.strategies.universal import convert
from lightning_longnet.trust import VARIABLE


def test_what_the_system_refuses_is_returned(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "run", fail)
    assert "Cannot allocate memory" in convert(tmp_path)


@pytest.mark.parametrize("trust", [False, True])
def test_it_reads_as_the_process_that_begins_it(tmp_path, monkeypatch, trust):
    result = []

    def run(command, **options):
        result.append(options["env"].get(VARIABLE))
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert convert(tmp_path, trust)
    assert result == ["1" if trust else None]
