"""What the tiers select, how many cases property tests draw in each, and what `make test-full` keeps of a run."""

import json
import re
import signal
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import full
import pytest
from programs import programs
from tiers import tiered

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PYTEST = Path(pytest.__file__).with_name("__main__.py")


def collect(folder, text, name="test_some"):
    """The words of pytest in a folder of its own that holds this test and our conftest.py."""
    folder.mkdir(exist_ok=True)
    (folder / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (folder / f"{name}.py").write_text(text)
    options = ["-c", ROOT / "pyproject.toml", "--rootdir", folder, "-p", "no:cacheprovider", folder]
    return [PYTEST, *options, "-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what this process has imported


def results(shown):
    (result,) = re.findall(r"=+ (.*) in ", shown)
    return result


@pytest.mark.long
def test_a_skip_fails_unless_it_waits_for_a_gpu(tmp_path):
    words = collect(
        tmp_path,
        "import pytest\n"
        "def test_forgotten(): pytest.skip('some day')\n"
        "@pytest.mark.gpu\n"
        "def test_gpu(): pytest.skip('no device')\n",
    )
    result = programs([words, [*words, "--no-skips"]])
    assert [results(shown) for _, shown, _ in result] == ["2 skipped", "1 failed, 1 skipped"]


@pytest.mark.long
def test_property_tests_draw_as_many_cases_as_their_tier_wants(tmp_path):
    text = (
        "from hypothesis import given, settings, strategies as st\n"
        "seen, plain = [], []\n"
        "@settings(max_examples=40, database=None)\n"
        "@given(st.integers())\n"
        "def test_told(x): seen.append(x)\n"
        "@settings(max_examples=5, database=None)\n"
        "@given(st.integers())\n"
        "def test_few(x): plain.append(x)\n"
        "def test_last(): print('drawn', len(seen), len(plain))\n"
    )
    tiers = {"plain": [], **{draws: [f"--draws={draws}"] for draws in ("few", "half", "many")}}
    result = programs([[*collect(tmp_path / t, text, f"test_{t}"), "-s", *more] for t, more in tiers.items()])
    drawn = [tuple(map(int, re.findall(r"drawn (\d+) (\d+)", shown)[0])) for _, shown, _ in result]
    assert drawn == [(40, 5), (8, 3), (20, 3), (400, 50)]


@pytest.mark.long
def test_a_test_stands_in_one_tier_and_property_tests_in_two(tmp_path):
    words = collect(
        tmp_path,
        "import pytest\n"
        "from hypothesis import given, strategies as st\n"
        "from tiers import tiered\n"
        "@pytest.mark.parametrize('case', tiered('abcd', quick='a', full='cd'))\n"
        "def test_matrix(case): pass\n"
        "@given(st.integers())\n"
        "def test_drawn(x): pass\n",
    )
    makefile = (ROOT / "Makefile").read_text()
    expressions = [
        re.search(rf"^{name}:.*\n.*-m \"(.*?)\"", makefile, re.MULTILINE)[1] for name in ("test", "test-long")
    ]
    result = programs(
        [[*words, "-q", "--collect-only", *more] for more in (*(["-m", e] for e in expressions), ["-m", "full"])]
    )
    assert [re.findall(r"::test_(\S+)", shown) for _, shown, _ in result] == [
        ["matrix[a]", "drawn"],
        ["matrix[b]", "drawn"],
        ["matrix[c]", "matrix[d]"],
    ]


def test_a_case_that_is_none_of_the_matrix_is_reported():
    with pytest.raises(AssertionError, match="'e'"):
        tiered("abcd", quick="e")


@pytest.mark.parametrize(("covers", "size"), [(1, 4), (2, 12)])
def test_long_cases_cover_values_or_pairs_of_values(covers, size):
    axes = ("abcd", (1, 2, 3), "xy")
    cases, quick = list(product(*axes)), [("a", 1, "x"), ("b", 1, "x")]
    marked = tiered(cases, quick, covers=covers)
    run = [
        getattr(each, "values", each)
        for each in marked
        if not any(m.name == "full" for m in getattr(each, "marks", ()))
    ]
    for first, second in combinations(range(3), 2):
        seen = {(case[first], case[second]) for case in run}
        assert covers == 1 or seen == set(product(axes[first], axes[second]))
    assert [{case[axis] for case in run} for axis in range(3)] == [set(axis) for axis in axes]
    assert (len(marked), [case for case in marked if not hasattr(case, "marks")]) == (24, quick)
    assert size <= len(run) <= size + 2, "few cases more than the least possible number"


OPTIONS = """
def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true")
    parser.addoption("--draws")
"""


class Repository:
    """A folder of tests that git knows, and `tests/full.py` over it."""

    def __init__(self, folder):
        self.folder, self.out = folder / "tests", folder / "kept/full.json"
        self.folder.mkdir()
        self.git("init", "-q")
        self.write("conftest.py", OPTIONS)
        self.write(".gitignore", "__pycache__/\n")  # the folder stays clean where bytecode is written

    def write(self, name, text):
        (self.folder / name).write_text(text)

    def git(self, *words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=self.folder, check=True)

    def commit(self, message):
        self.git("add", ".")
        self.git("commit", "-qm", message)

    def run(self, *words):
        """Return the status, what it printed, and the rows of files that were recorded."""
        command = [TESTS / "full.py", "--tests", self.folder, "--out", self.out, *words]
        ((status, shown, error),) = programs([command])
        assert not error
        return status, shown, json.loads(self.out.read_text())["files"]


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)


@pytest.mark.long
def test_a_full_run_goes_on_where_it_was_stopped(repository):
    repository.write("test_good.py", "def test_a(): pass\ndef test_b(): pass\n")
    repository.write("test_bad.py", "def test_c(): assert False, 'broken'\ndef test_d(): pass\n")
    repository.commit("Two files")
    status, shown, files = repository.run(repository.folder / "test_good.py")
    assert status == 1, "a file was not run"
    assert "without a result, 1 files: test_bad.py" in shown
    assert set(files) == {"test_good.py"}
    before = files["test_good.py"]
    assert (before["status"], before["passed"], before["failed"], before["skipped"]) == ("passed", 2, 0, 0)

    status, shown, files = repository.run()
    assert status == 1
    assert files["test_good.py"] == before
    assert re.search(r"test_good.py .* passed, before", shown)
    assert (files["test_bad.py"]["status"], files["test_bad.py"]["passed"]) == ("failed", 1)
    assert files["test_bad.py"]["failures"] == ["test_c"]
    assert "broken" in shown
    assert "1 of 2 files passed" in shown
    assert "did not pass, 1 files: test_bad.py" in shown

    repository.write("test_bad.py", "def test_c(): pass\n")
    repository.commit("Mended")
    status, shown, files = repository.run()
    assert status == 0
    assert files["test_good.py"]["commit"] == files["test_bad.py"]["commit"] != before["commit"]
    assert "before" not in shown, "another commit is another run"
    repository.write("test_good.py", "def test_a(): pass\n")
    assert repository.run()[2]["test_good.py"]["commit"] is None, "what is not committed is no result of a commit"


def test_a_full_run_is_completed_over_several_runs_and_machines(repository, monkeypatch, capsys):
    seconds = iter(range(0, 10**6, 60))  # a file takes a minute
    monkeypatch.setattr(full, "monotonic", lambda: next(seconds))
    dates = iter(range(1000))
    counts = {"passed": 1, "failed": 0, "skipped": 0, "seconds": 60.0}

    class FileRun:
        def __init__(self, folder, name, timeout):
            self.name, self.date = name, f"day {next(dates):03}"

        def row(self, wait):
            return {"status": "passed", **counts, "date": self.date}

    monkeypatch.setattr(full, "FileRun", FileRun)
    here, there = full.machine(), full.machine() | {"cpu": "Another CPU", "cores": 96}

    def run(machine, *words):
        monkeypatch.setattr(full, "machine", lambda: machine)
        options = ["--tests", str(repository.folder), "--out", str(repository.out), "--processes", "1"]
        status = full.main([*options, *words])
        kept = json.loads(repository.out.read_text())
        return status, capsys.readouterr().out, kept["files"], kept["machines"]

    for name in "abc":
        repository.write(f"test_{name}.py", "")
    repository.commit("Three files")
    status, shown, files, machines = run(there, "--minutes", "1.5")
    assert (status, set(files), list(machines.values())) == (1, {"test_a.py"}, [there])
    assert "1 of 3 files passed" in shown
    assert "without a result, 2 files: test_b.py, test_c.py" in shown

    repository.write("test_c.py", "import os\n")
    repository.commit("A change")
    status, shown, files, _ = run(here, "--minutes", "1.5")
    assert (status, set(files)) == (1, {"test_a.py", "test_b.py"}), "files without a result come first"
    status, shown, files, machines = run(here, str(repository.folder / "test_c.py"), "--behind", "0")
    assert status == 0, "each file has passed somewhere"
    assert [machines[files[f"test_{name}.py"]["machine"]] for name in "abc"] == [there, here, here]
    assert "3 of 3 files passed" in shown
    assert f"passed at {files['test_b.py']['commit'][:10]}, 0 commits ago: 2 files" in shown
    assert f"passed at {files['test_a.py']['commit'][:10]}, 1 commits ago: 1 files" in shown
    versions = here["versions"]
    assert f"passed on Another CPU, 96 cores, Linux, python {versions['python']}, torch {versions['torch']}, " in shown
    assert "more than 0 commits old, 1 files: test_a.py" in shown

    status, shown, same, _ = run(here, "--minutes", "0")
    assert (status, same) == (0, files)
    assert "commits old" not in shown
    _, shown, again, machines = run(here, "--minutes", "1.5")
    assert [name for name in files if again[name] != files[name]] == ["test_a.py"], "then the oldest result"
    assert shown.count("passed, before") == 2
    assert list(machines.values()) == [here], "a machine without results is left out"


@pytest.mark.long
def test_two_files_run_at_a_time_and_end_with_an_interrupted_run(repository, tmp_path):
    """Each file waits until the other one runs; then one of them waits, and the run is interrupted."""
    for name, other in ("ab", "ba"):
        repository.write(
            f"test_{name}.py",
            "import time, pathlib\n"
            "def test_it():\n"
            f"    pathlib.Path({str(tmp_path)!r}, {name!r}).touch()\n"
            "    end = time.monotonic() + 60\n"
            f"    while not pathlib.Path({str(tmp_path)!r}, {other!r}).exists():\n"
            "        assert time.monotonic() < end\n"
            "        time.sleep(0.05)\n" + ("    time.sleep(600)\n" if name == "b" else ""),
        )
    command = [sys.executable, TESTS / "full.py", "--tests", repository.folder, "--out", repository.out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert re.fullmatch("test_a.py .* passed", process.stdout.readline().strip())
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert set(json.loads(repository.out.read_text())["files"]) == {"test_a.py"}
    running = subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert str(repository.folder / "test_b.py") not in running


@pytest.mark.long
def test_a_file_without_an_end_is_given_up(tmp_path):
    (tmp_path / "conftest.py").write_text(OPTIONS)
    (tmp_path / "test_long.py").write_text("import time\ndef test_it(): time.sleep(600)\n")
    out = tmp_path / "full.json"
    ((status, _, _),) = programs([[TESTS / "full.py", "--tests", tmp_path, "--out", out, "--timeout", "1"]])
    assert status == 1
    assert json.loads(out.read_text())["files"]["test_long.py"]["status"] == "no end in 1 s"
