"""Programs in a process that has loaded torch and Lightning: this takes longer than what each of them does."""

import contextlib
import io
import os
import runpy
import sys
import warnings
from pathlib import Path

from workers import answer, forked

ROOT = Path(__file__).resolve().parents[1]
LONGNET = ROOT / "lightning_longnet/__main__.py"
PATIENCE = 300  # seconds for all of them


def programs(commands, folder=ROOT):
    """Return (status, stdout, stderr) of each [path, word, ...], run one after the other in a folder and a process."""
    context = forked()
    here, there = context.Pipe()
    process = context.Process(target=answer, args=(there, _run, [list(map(str, words)) for words in commands], folder))
    process.start()
    there.close()
    try:
        assert here.poll(PATIENCE), f"no end in {PATIENCE} s"
        is_result, outcome = here.recv()
    finally:
        process.kill()
        process.join()
    assert is_result, outcome[2]
    return outcome


def _run(commands, folder):
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.chdir(folder)
    results = []
    for path, *words in commands:
        sys.argv, out, err = [path, *words], io.StringIO(), io.StringIO()
        sys.path.insert(0, path.rpartition("/")[0])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(path, run_name="__main__")
                status = 0
            except SystemExit as ended:
                status = ended.code or 0
        sys.path.pop(0)
        results.append((status, out.getvalue(), err.getvalue()))
    return results
