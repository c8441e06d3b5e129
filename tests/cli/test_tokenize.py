"""`longnet tokenize`: the same bytes for any number of processes, and after a run that was killed."""

import itertools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_longnet.cli import main
from lightning_longnet.data import tokenizing
from lightning_longnet.data.tokenizing import lines_of

SHARD, SHARDS = ["--shard-megabytes", "0.02"], 14


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(30):
        (folder / f"{i:02}.txt").write_text("".join(f"{i} and {n} are {i + n}\n" for n in range(400 + 20 * i)))
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def undisturbed(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert main(["tokenize", str(texts), "--out", str(out), "--workers", "1", *SHARD]) == 0
    result = contents(out)
    assert len(result) == 2 * SHARDS + 1
    return result


def test_several_processes_write_the_same(texts, undisturbed, tmp_path, capsys):
    assert main(["tokenize", str(texts), "--out", str(tmp_path / "out"), "--workers", "2", *SHARD]) == 0
    assert contents(tmp_path / "out") == undisturbed
    said = capsys.readouterr()
    assert "tokens of 1.00 bytes, vocabulary 256" in said.out
    assert "30 files: 100%" in said.err


STANDS_STILL = """
import sys, time
import numpy as np
from lightning_longnet.cli import main
save = np.save
written = []
def stands_still(opened, content):
    written.append(content.dtype)
    if written.count(np.uint8) == 4:  # when half of the fourth shard is there
        opened.write(b"half")
        opened.flush()
        time.sleep(60)
    save(opened, content)
np.save = stands_still
sys.exit(main(sys.argv[1:]))
"""


def half_written(out):
    return any(path.stat().st_size == 4 for path in out.glob("tokens-00003.npy*"))


def test_a_run_that_is_killed_goes_on(texts, undisturbed, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["tokenize", str(texts), "--out", str(out), "--workers", "1", *SHARD]
    process = subprocess.Popen([sys.executable, "-c", STANDS_STILL, *command], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not half_written(out) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    left = contents(out)
    assert "tokens.json" not in left
    assert "unfinished.json" in left
    done = [name for name in left if name.startswith("tokens-") and name.endswith(".npy")]
    assert len(done) == 3
    assert half_written(out)
    times = {name: (out / name).stat().st_mtime_ns for name in done}
    assert main(command) == 0
    assert contents(out) == undisturbed
    assert times == {name: (out / name).stat().st_mtime_ns for name in done}  # not written again
    assert main(command) == 0  # nothing is left to do
    assert contents(out) == undisturbed


@pytest.mark.long
def test_workers_of_a_run_that_is_killed_end(texts, tmp_path):
    out = tmp_path / "out"
    command = ["tokenize", str(texts), "--out", str(out), "--workers", "2", *SHARD]
    (tmp_path / "stands_still.py").write_text(STANDS_STILL.replace("sys.exit", "if __name__ == '__main__': sys.exit"))
    process = subprocess.Popen([sys.executable, str(tmp_path / "stands_still.py"), *command], stderr=subprocess.DEVNULL)
    children = []
    try:
        until = time.monotonic() + 60
        while not list(out.glob("tokens-*.npy")) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        children = children_of(process.pid)
        assert len(children) >= 2
    finally:
        process.kill()
        process.wait()
    until = time.monotonic() + 20
    while any(map(is_running, children)) and time.monotonic() < until:
        time.sleep(0.05)
    alive = [child for child in children if is_running(child)]
    for child in alive:
        os.kill(child, signal.SIGKILL)
    assert not alive


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as listed:
        return [int(each) for each in listed.read().split()]


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab\n", max_size=9)), st.lists(st.integers(0, 60), max_size=4))
def test_pieces_of_a_file_are_its_lines_each_once(tmp_path_factory, parts, cuts):
    raw = "".join(parts).encode()
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    path.write_bytes(raw)
    borders = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
    pieces = [lines_of(path, begin, end) for begin, end in itertools.pairwise(borders)]
    assert b"".join(pieces) == raw
    assert all(piece.endswith(b"\n") for piece in pieces[:-1] if piece and raw.endswith(b"\n"))


def test_long_files_are_cut_at_lines(texts, undisturbed, tmp_path, monkeypatch):
    """For bytes it makes no difference where; documents begin where files do."""
    monkeypatch.setattr(tokenizing, "PIECE_BYTES", 1000)
    assert main(["tokenize", str(texts), "--out", str(tmp_path / "out"), "--workers", "1", *SHARD]) == 0

    def joined(held):
        shards = [name for name in sorted(held) if name.startswith("tokens-")]
        return b"".join(held[name].split(b"\n", 1)[1] for name in shards)

    assert joined(contents(tmp_path / "out")) == joined(undisturbed)
    starts, count = [], 0
    for shard in sorted((tmp_path / "out").glob("tokens-*.npy")):
        starts += (np.load(tokenizing.document_file(shard)) + count).tolist()
        count += len(np.load(shard))
    sizes = [path.stat().st_size + 1 for path in sorted(texts.iterdir())]
    assert starts == np.cumsum([0, *sizes[:-1]]).tolist()


def refused(capsys, *arguments):
    assert main(["tokenize", *map(str, arguments)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("longnet: error: ")
    return said


def test_what_does_not_fit_is_reported_in_a_line(tmp_path, texts, capsys):
    out = tmp_path / "out"
    assert "paths must be files or folders that are there" in refused(capsys, tmp_path / "missing", "--out", out)
    (tmp_path / "empty").mkdir()
    assert "found none in the folder" in refused(capsys, tmp_path / "empty", "--out", out)
    assert "workers must be a positive number" in refused(capsys, texts, "--out", out, "--workers", -1)
    assert "shard-megabytes must be more than 0, got 0" in refused(capsys, texts, "--out", out, "--shard-megabytes", 0)
    assert "shard-megabytes must be more than 0, got nan" in refused(
        capsys, texts, "--out", out, "--shard-megabytes=nan"
    )
    (tmp_path / "file").touch()
    assert "--out must be a folder, or a new name" in refused(capsys, texts, "--out", tmp_path / "file", "--workers=1")
    (tmp_path / "other").mkdir()
    for content, message in (("{", "got what is no JSON"), ("[]", "got a list"), ("{}", "out must be a folder of its")):
        (tmp_path / "other/tokens.json").write_text(content)
        assert message in refused(capsys, texts, "--out", tmp_path / "other", "--workers=1")
    (tmp_path / "latin.txt").write_bytes("naïve\n".encode("latin-1"))
    for workers in (1, 2):
        said = refused(capsys, tmp_path / "latin.txt", "--out", tmp_path / f"latin{workers}", "--workers", workers)
        assert "paths must hold text in UTF-8" in said
        assert "latin.txt does not" in said
    assert not out.exists()
    assert main(["tokenize", str(texts), "--out", str(out), "--workers", "1"]) == 0
    assert "out must be a folder of its own" in refused(capsys, texts / "01.txt", "--out", out)
