"""The soak: that it has the cells that the pages name, finds what does not hold, and goes on where it was stopped."""

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "supervision"))
sys.path.append(str(Path(__file__).parents[1] / "checkpointing"))
sys.path.append(str(Path(__file__).parents[1] / "strategies"))
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import counted
import kills_of_ranks
import soak
import soak_cells

ROOT = Path(__file__).parents[2]


def test_there_are_as_many_cells_as_the_table_says():
    result = Counter(kind for kind, _ in soak_cells.cells())
    kills = kills_of_ranks.IN_SAVES + kills_of_ranks.AT_TIMES
    assert all(result[kind] * kills >= least for kind, least in soak.KILLS.items())  # one may come after the end
    assert set(soak.KILLS) == set(soak.ROWS)
    assert sum(soak.KILLS.values()) == 100
    assert sum(result[kind] for kind in soak.ROWS) * kills_of_ranks.IN_SAVES >= 40
    rest = {kind: count for kind, (_, count) in soak.OTHERS.items() if kind not in soak_cells.TESTS}
    assert {kind: result[kind] for kind in rest} == rest
    assert set(result) == set(soak_cells.KINDS)
    assert {*soak_cells.KINDS, *soak_cells.TESTS} == {*soak.ROWS, *soak.OTHERS}


@pytest.mark.parametrize("kind", soak_cells.TESTS)
def test_the_tests_that_are_counted_exist(kind):
    for file, names in soak_cells.TESTS[kind].items():
        tree = ast.parse((counted.TESTS / file).read_text())
        functions = {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}
        assert set(names) <= functions, file


@pytest.mark.parametrize("change", ["", "loss", "step", "parameter"])
def test_what_differs_is_seen(tmp_path, change):
    import torch

    for name in ("whole", "found"):
        (folder := tmp_path / name).mkdir()
        is_changed = name == "found"
        rows = ["0 1.5 1.0", "1 1.25 2.0"] + ([] if is_changed else ["2 1.125 3.0"])
        rows += ["1 1.25 3.0", "2 1.125 3.0"] if is_changed else []  # restarted after step 1
        if is_changed and change in ("loss", "step"):
            rows[-1] = "2 1.1250000000000002 3.0" if change == "loss" else rows[0]
        for rank in range(2):
            (folder / f"losses-{rank}.txt").write_text("\n".join(rows))
        values = torch.ones(3)
        values[1] += 1e-7 if is_changed and change == "parameter" else 0
        torch.save({"x": values}, folder / "parameters.pt")
    assert kills_of_ranks.equal(tmp_path / "whole", tmp_path / "found") == (change == "")


def test_a_failed_cell_is_shown_and_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("full.commit_of", lambda folder: "abc")
    path = tmp_path / "found.jsonl"
    log = soak.Log(path, 0, False)
    log.add("faults, ddp", ("abort", 0, "save"), "", 2.0, {"ended_after": 1.5})
    log.add("faults, ddp", ("abort", 1, "save"), "no end in 240 s", 240.0)
    again = soak.Log(path, 0, False)
    assert again.has("faults, ddp", ("abort", 0, "save"))
    assert not again.has("faults, ddp", ("abort", 1, "save"))
    assert not soak.Log(path, 1, False).has("faults, ddp", ("abort", 0, "save")), "another seed"
    monkeypatch.setattr("full.commit_of", lambda folder: "def")
    assert not soak.Log(path, 0, False).has("faults, ddp", ("abort", 0, "save")), "other code"
    assert soak.Log(path, 0, True).has("faults, ddp", ("abort", 0, "save"))
    assert "| 1 of 2 (108 more were not run) | ended after 2 s |" in soak.table(path)
    assert "FAILED  240.0 s  faults, ddp: ('abort', 1, 'save')" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["soak.py", "--minutes", "0", "--out", str(path)])
    monkeypatch.setattr(soak, "soak", lambda *arguments: None)
    assert soak.main() == 1


def run(out, *words):
    command = [sys.executable, str(ROOT / "benchmarks/soak.py"), "--out", str(out), *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize(
    "kinds",
    [
        # `tests/supervision/test_fault_matrix.py` runs cells of "faults, ddp"
        pytest.param(("kills, fsdp2",), marks=pytest.mark.full),
        pytest.param(("exact", "engines", "faults, ddp", "elastic"), marks=pytest.mark.full),
    ],
    ids=", ".join,
)
def test_one_cell_of_each_kind_holds(tmp_path, kinds):
    status, shown, errors = run(tmp_path / "found.jsonl", "--first", "--kinds", *kinds)
    assert status == 0, shown + errors
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert sorted(line["kind"] for line in lines if "kind" in line) == sorted(kinds)
    assert all(line["held"] for line in lines if "kind" in line)


LEFT = """
import subprocess, sys, time
sys.path[:0] = {folders}
import forks
from lightning_longnet.supervision.processes import state_of
forks.adopt()
before = forks.children()
def main():
    subprocess.Popen(["sleep", "100"], start_new_session=True)
process = forks.ForkedProcess(["x"], main)
process.wait()
(found,) = forks.left(before)
print(state_of(found) == "", forks.left(before))
"""


@pytest.mark.full
def test_a_process_that_is_left_is_found_and_ended():
    folders = [str(ROOT), *(str(ROOT / "tests" / name) for name in ("", "soak"))]
    result = subprocess.run(
        [sys.executable, "-c", LEFT.format(folders=folders)], capture_output=True, text=True, timeout=120
    )
    assert result.stdout.strip() == "True []", result.stderr
