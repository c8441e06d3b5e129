"""Many programs in one process: loading torch and Lightning takes longer than what each of them does."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGNET = ROOT / "lightning_longnet/__main__.py"

SESSION = """
import contextlib, io, json, runpy, sys, warnings
warnings.simplefilter("ignore")
found = []
for path, *words in json.loads(sys.argv[1]):
    sys.argv, out, err = [path, *words], io.StringIO(), io.StringIO()
    sys.path.insert(0, path.rpartition("/")[0])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(path, run_name="__main__")
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
    sys.path.pop(0)
    found.append([status, out.getvalue(), err.getvalue()])
print("\\n" + json.dumps(found))
"""


def programs(commands, folder=ROOT):
    """(status, stdout, stderr) of each [path, word, ...], in a folder."""
    told = json.dumps([list(map(str, words)) for words in commands])
    command = [sys.executable, "-c", SESSION, told]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])
