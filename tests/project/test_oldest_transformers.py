"""The oldest transformers that `pyproject.toml` allows, in an environment that takes all else from this one."""

import os
import re
import shlex
import sys
import sysconfig
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from test_installed import PATIENCE, run

ROOT = Path(__file__).resolve().parents[2]
# the quick tests of models of transformers, and of modules and exports that hold one
TESTS = [
    "tests/huggingface",
    *(f"tests/training/test_{name}.py" for name in ("batch_documents", "decoder_module", "exports_of_runs")),
    *("tests/training/test_saved_memory.py", "tests/inference"),
]


def lower_bound():
    """Return the lower bound of transformers, as "5.19"."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (requirement,) = [each for each in extras["hf"] if each.startswith("transformers")]
    return re.fullmatch(r"transformers>=(5\.\d+)", requirement)[1]


def test_the_bound_is_a_minor_version_before_that_of_the_constraints():
    (pinned,) = re.findall(r"^transformers==5\.(\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert int(lower_bound().split(".")[1]) < int(pinned)


@pytest.mark.full
def test_quick_tests_pass_with_the_oldest_transformers(tmp_path, record_property):
    run(sys.executable, "-m", "venv", "env", folder=tmp_path)
    python = tmp_path / "env/bin/python"
    (packages,) = (tmp_path / "env/lib").glob("python*/site-packages")
    (packages / "outer.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")  # where pip finds torch
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    (tmp_path / "others.txt").write_text("\n".join(each for each in pins if not each.startswith("transformers==")))
    options = [*shlex.split(os.environ.get("PIP_ARGS", "")), "--constraint", "others.txt"]
    command = [python, "-m", "pip", "install", "-q", *options, f"transformers=={lower_bound()}.*"]
    run(*command, folder=tmp_path, timeout=PATIENCE)
    installed = run(python, "-c", "import transformers; print(transformers.__version__)", folder=tmp_path).strip()
    assert installed.startswith(f"{lower_bound()}.")

    command = [python, "-m", "pytest", *TESTS, "-q", "-m", "not long and not full", "--draws", "few", "--no-skips"]
    shown = run(*command, "-p", "no:cacheprovider", folder=ROOT, timeout=PATIENCE)
    counts = shown.strip().splitlines()[-1]
    assert re.search(r"\b\d+ passed", counts)
    record_property("note", f"transformers {installed} beside {version('transformers')}: {counts}")
