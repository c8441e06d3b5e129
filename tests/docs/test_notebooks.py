"""The notebooks: they are what their pages say, and their cells run and print what they show."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pages
import pytest
from outputs import assert_shown
from tiers import tiered

ROOT = Path(__file__).parents[2]


def path_of(name):
    return ROOT / f"docs/notebooks/{name}.ipynb"


def steps(text):
    return [line.strip() for line in text.splitlines() if line.startswith("step ")]


@pytest.mark.parametrize("name", pages.NOTEBOOKS)
def test_a_notebook_is_its_page(name):
    """`python docs/pages.py` writes it."""
    assert path_of(name).read_text() == pages.notebook((ROOT / f"docs/{name}.md").read_text())


def run(source, folder, names):
    """What a cell prints, as Jupyter runs it."""
    if source.startswith("%%writefile "):
        name, _, text = source.removeprefix("%%writefile ").partition("\n")
        (folder / name).write_text(text + "\n")
        return ""
    if source.startswith("!"):
        words = [sys.executable if word == "python" else word for word in shlex.split(source[1:])]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)
        return result.stdout + result.stderr
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(source, "cell", "exec"), names)
    return shown.getvalue()


@pytest.mark.parametrize("name", tiered(pages.NOTEBOOKS, quick=[], long=["patterns"]))
def test_the_cells_of_a_notebook_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, losses = {}, []
    for cell in json.loads(path_of(name).read_text())["cells"]:
        if cell["cell_type"] == "code":
            shown = run("".join(cell["source"]), tmp_path, names)
            texts = ["".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream"]
            assert_shown("".join(texts), shown)
            losses += [steps(shown)] if steps(shown) else []
    if name == "tutorial":  # one process with the first model, and two ranks with the right one
        assert len(losses) == 2
        assert len(losses[0]) == 5
        assert losses[0] == losses[1]
