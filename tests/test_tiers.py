"""What the tiers select, how many cases property tests draw in each, and what `make test-full` keeps of a run."""

import json
import re
import subprocess
from pathlib import Path

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
    told = ["-c", ROOT / "pyproject.toml", "--rootdir", folder, "-p", "no:cacheprovider", folder]
    return [PYTEST, *told, "-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what this process has imported


def results(shown):
    (found,) = re.findall(r"=+ (.*) in ", shown)
    return found


def test_a_skip_fails_unless_it_waits_for_a_gpu(tmp_path):
    words = collect(
        tmp_path,
        "import pytest\n"
        "def test_forgotten(): pytest.skip('some day')\n"
        "@pytest.mark.gpu\n"
        "def test_gpu(): pytest.skip('no device')\n",
    )
    found = programs([words, [*words, "--no-skips"]])
    assert [results(shown) for _, shown, _ in found] == ["2 skipped", "1 failed, 1 skipped"]


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
    tiers = {"plain": [], "few": ["--draws=few"], "many": ["--draws=many"]}
    found = programs([[*collect(tmp_path / t, text, f"test_{t}"), "-s", *more] for t, more in tiers.items()])
    drawn = [tuple(map(int, re.findall(r"drawn (\d+) (\d+)", shown)[0])) for _, shown, _ in found]
    assert drawn == [(40, 5), (8, 3), (400, 50)]


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
    found = programs(
        [[*words, "-q", "--collect-only", *more] for more in (*(["-m", e] for e in expressions), ["-m", "full"])]
    )
    assert [re.findall(r"::test_(\S+)", shown) for _, shown, _ in found] == [
        ["matrix[a]", "drawn"],
        ["matrix[b]", "drawn"],
        ["matrix[c]", "matrix[d]"],
    ]


def test_a_case_that_is_none_of_the_matrix_is_told():
    with pytest.raises(AssertionError, match="'e'"):
        tiered("abcd", quick="e")


OPTIONS = """
def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true")
    parser.addoption("--draws")
"""


@pytest.mark.long
def test_a_full_run_goes_on_where_it_was_stopped(tmp_path):
    folder, out = tmp_path / "tests", tmp_path / "kept/full.json"
    folder.mkdir()
    (folder / "conftest.py").write_text(OPTIONS)
    (folder / "test_good.py").write_text("def test_a(): pass\ndef test_b(): pass\n")
    (folder / "test_bad.py").write_text("def test_c(): assert False, 'broken'\ndef test_d(): pass\n")

    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=folder, check=True)

    def full(*words):
        command = [TESTS / "full.py", "--tests", folder, "--out", out, *words]
        ((status, shown, error),) = programs([command])
        assert not error
        return status, shown, json.loads(out.read_text())["files"]

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "Two files")
    status, shown, files = full(folder / "test_good.py")
    assert status == 1, "a file was not run"
    assert "not run: test_bad.py" in shown
    assert set(files) == {"test_good.py"}
    before = files["test_good.py"]
    assert (before["status"], before["passed"], before["failed"], before["skipped"]) == ("passed", 2, 0, 0)

    status, shown, files = full()
    assert status == 1
    assert files["test_good.py"] == before
    assert re.search(r"test_good.py .* passed, before", shown)
    assert (files["test_bad.py"]["status"], files["test_bad.py"]["passed"]) == ("failed", 1)
    assert files["test_bad.py"]["failures"] == ["test_c"]
    assert "broken" in shown
    assert "1 of 2 files passed" in shown

    (folder / "test_bad.py").write_text("def test_c(): pass\n")
    git("commit", "-qam", "Mended")
    status, shown, files = full()
    assert status == 0
    assert files["test_good.py"]["commit"] == files["test_bad.py"]["commit"] != before["commit"]
    assert "before" not in shown, "another commit is another run"
    (folder / "test_good.py").write_text("def test_a(): pass\n")
    assert full()[2]["test_good.py"]["commit"] is None, "what is not committed is no result of a commit"


@pytest.mark.long
def test_a_file_without_an_end_is_given_up(tmp_path):
    (tmp_path / "conftest.py").write_text(OPTIONS)
    (tmp_path / "test_long.py").write_text("import time\ndef test_it(): time.sleep(600)\n")
    out = tmp_path / "full.json"
    ((status, _, _),) = programs([[TESTS / "full.py", "--tests", tmp_path, "--out", out, "--timeout", "1"]])
    assert status == 1
    assert json.loads(out.read_text())["files"]["test_long.py"]["status"] == "no end in 1 s"
