"""The process that converts checkpoints of DeepSpeed: what goes wrong is returned, so that all ranks raise it."""

import subprocess

from lightning_longnet.strategies.universal import convert


def test_what_the_system_refuses_is_returned(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "run", fail)
    assert "Cannot allocate memory" in convert(tmp_path)
