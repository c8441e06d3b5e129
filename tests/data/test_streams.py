"""Streams give any stretch of what their files hold, whatever borders it crosses."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_longnet.data.paths import found_files
from lightning_longnet.data.streams import ByteFiles, Slice, TokenFiles, documents_of, entropy_bits

SIZES = [5, 0, 1, 7, 0]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    raw = np.random.default_rng(0).integers(0, 256, sum(SIZES), dtype=np.uint8)
    paths = []
    for number, part in enumerate(np.split(raw, np.cumsum(SIZES)[:-1])):
        paths.append(folder / f"{number}.txt")
        paths[-1].write_bytes(part.tobytes())
    return paths, torch.from_numpy(raw.astype(np.int64))


@settings(max_examples=40)
@given(st.data())
def test_any_stretch_of_files_and_of_slices(texts, data):
    paths, whole = texts
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, 13)] * 2)))
    stream = ByteFiles(paths)
    result = stream.read(begin, end)
    assert result.dtype == torch.int64
    assert torch.equal(result, whole[begin:end])
    part = Slice(stream, begin, end)
    assert len(part) == end - begin
    assert torch.equal(part.read(0, len(part)), whole[begin:end])
    inside = [border for border in (5, 6) if begin < border < end]
    assert part.starts.tolist() == [0, *(border - begin for border in inside)]


def test_each_file_is_a_document(texts):
    assert list(documents_of(ByteFiles(texts[0]))) == [(0, 5), (5, 6), (6, 13)]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_shards_of_tokens(tmp_path, dtype):
    whole = np.arange(11).astype(dtype) + (np.iinfo(dtype).max - 20 if dtype != np.uint32 else 2**31)
    shards, borders = [tmp_path / "b.npy", tmp_path / "c.npy"], [tmp_path / "1.npy", tmp_path / "2.npy"]
    np.save(shards[0], whole[:4])
    np.save(shards[1], whole[4:])
    np.save(borders[0], np.array([0, 3]))
    np.save(borders[1], np.array([2]))  # what begins in the first goes on in the second
    stream = TokenFiles(shards, borders)
    assert stream.read(2, 9).tolist() == whole[2:9].tolist()
    assert stream.starts.tolist() == [0, 3, 6]
    assert TokenFiles(shards).starts.tolist() == [0]
    sent = pickle.dumps(stream)
    assert len(sent) < 2000
    assert b"memmap" not in sent
    assert torch.equal(pickle.loads(sent).read(0, 11), stream.read(0, 11))


@pytest.mark.parametrize("array", [np.zeros((2, 3), np.uint8), np.zeros(3, np.int64), np.zeros(3, np.float32)])
def test_other_arrays_are_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=r"a\.npy must hold tokens, one row of uint8, uint16 or uint32, got"):
        TokenFiles([tmp_path / "a.npy"])


def test_a_part_of_an_array_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(1000, dtype=np.uint16))
    whole = (tmp_path / "a.npy").read_bytes()
    for kept in (0, 50, 1500):
        (tmp_path / "a.npy").write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"a\.npy must be a whole \.npy file: "):
            TokenFiles([tmp_path / "a.npy"])


@pytest.mark.parametrize("stretch", [(-1, 2), (3, 2), (0, 14)])
def test_what_is_not_there_is_not_read(texts, stretch):
    with pytest.raises(ValueError, match="begin and end must lie within the 13 tokens there are"):
        ByteFiles(texts[0]).read(*stretch)


def test_a_file_that_shrinks_is_noticed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abcdef")
    stream = ByteFiles([path])
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"a\.txt has become shorter"):
        stream.read(2, 5)


def test_streams_are_distinguished(texts):
    paths, _ = texts
    streams = [ByteFiles(paths), ByteFiles(paths[1:]), Slice(ByteFiles(paths), 0, 4), Slice(ByteFiles(paths), 1, 4)]
    assert len({each.identity for each in streams}) == 4
    assert ByteFiles(paths).identity == streams[0].identity


def test_entropy_is_of_the_frequencies(tmp_path):
    (path := tmp_path / "a.txt").write_bytes(b"\0\0\1\2")
    assert entropy_bits(ByteFiles([path]), 256) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="vocab_size must be more than every token, got 2 and a token 2"):
        entropy_bits(ByteFiles([path]), 2)


def test_files_are_found_however_deep_and_in_order(tmp_path):
    for name in ("b.py", "a/z.py", "a/x/y.py", "a/n.txt", "c/skipped/k.py", ".git/h.py", "a/.h.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    result = found_files("paths", [tmp_path, tmp_path / "b.py", tmp_path / "a/n.txt"], "*.py", ["skipped"])
    assert [path.relative_to(tmp_path).as_posix() for path in result] == ["a/n.txt", "a/x/y.py", "a/z.py", "b.py"]


def test_a_file_of_several_names_is_read_once(tmp_path, monkeypatch):
    (folder := tmp_path / "texts").mkdir()
    (folder / "b.py").write_text("b")
    (folder / "a.py").symlink_to(folder / "b.py")
    (tmp_path / "linked").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert found_files("paths", ["texts/b.py", folder / "b.py", "texts/../texts/b.py"], "*") == [folder / "b.py"]
    assert found_files("paths", ["linked", "texts"], "*.py") == [Path("linked/a.py")]


def test_a_folder_is_followed_once_for_all_of_its_files(tmp_path, monkeypatch):
    """The standard library has two thousand files, which the first batch of the quickstart waits for."""
    for number in range(20):
        (tmp_path / f"{number}.py").write_text("text")
    (tmp_path / "link.py").symlink_to(tmp_path / "0.py")
    followed = []
    resolve = Path.resolve
    monkeypatch.setattr(Path, "resolve", lambda path: followed.append(path) or resolve(path))
    assert len(found_files("paths", [tmp_path], "*.py")) == 20
    assert sorted(followed) == [tmp_path, tmp_path / "link.py"]


def test_what_is_not_found_is_reported_in_a_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"paths must be files or folders that are there, .*missing is not"):
        found_files("paths", [tmp_path / "missing"], "*.py")
    (folder := tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"paths must hold files like '\*.py', found none in the folder .*empty$"):
        found_files("paths", [folder], "*.py")
    (tmp_path / "texts/more").mkdir(parents=True)
    for name in ("a.txt", "more/b.txt", "c.md", "more/.d.md", "e"):
        (tmp_path / "texts" / name).write_text(name)
    message = f"found none in the folder {tmp_path.resolve()}/texts; it has 2 files *.txt: pattern='*.txt'"
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        found_files("paths", [folder / "../texts"], "*.py")
    (tmp_path / "texts/a.txt").unlink()
    with pytest.raises(ValueError, match=r"; it has 1 file \*.md: pattern='\*.md'$"):
        found_files("paths", [tmp_path / "texts"], "*.py", ["more"])
    (folder / "a.py").touch()
    with pytest.raises(ValueError, match="paths must hold some text, all 1 files are empty"):
        found_files("paths", [folder], "*.py")
