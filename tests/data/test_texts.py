"""Text files as streams of tokens: those that `longnet tokenize` writes, of files of any form."""

import pytest
import torch

from lightning_longnet.data import texts
from lightning_longnet.data.texts import Text, TokenReader, regrouped, texts_of
from lightning_longnet.data.tokenizers import ByteTokenizer
from lightning_longnet.data.tokenizing import lines_of


def text_of(path, content):
    path.write_bytes(content)
    return Text(path, len(content), 0)


CONTENTS = {
    "lines": "".join(f"line {i} ä€\n" for i in range(200)).encode(),
    "one long line": ("ä€x" * 400).encode(),
    "a long line between": b"short\n" + "€".encode() * 300 + b"\nshort\n\n\nend",
    "a newline at each border": (b"x" * 15 + b"\n") * 30,
}


class Words:
    """A tokenizer whose tokens depend on where a text is cut."""

    def encode(self, text):
        return [len(word) for word in text.split(" ")]


@pytest.mark.parametrize("name", CONTENTS)
def test_pieces_hold_all_text_and_are_small(tmp_path, monkeypatch, name):
    monkeypatch.setattr(texts, "PIECE_BYTES", 16)
    monkeypatch.setattr(texts, "_LINE_BYTES", 64)
    pieces = [*TokenReader(text_of(tmp_path / "a.txt", CONTENTS[name]), ByteTokenizer())]
    assert bytes(torch.cat(pieces).tolist()) == CONTENTS[name]
    assert max(map(len, pieces)) <= 16 + 64 + 3
    assert len(pieces) > 3


def test_pieces_are_those_of_longnet_tokenize(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "PIECE_BYTES", 16)
    text = text_of(tmp_path / "a.txt", CONTENTS["a long line between"] + CONTENTS["lines"])
    expected = [lines_of(text.path, begin, begin + 16).decode() for begin in range(0, text.size, 16)]
    result = torch.cat([*TokenReader(text, Words())]).tolist()
    assert result == [token for each in expected if each for token in Words().encode(each)]


@pytest.mark.parametrize("size", [1, 7, 100])
def test_blocks_have_one_size(size):
    pieces = [torch.arange(i * 10, i * 10 + i) for i in (3, 0, 8, 1, 9)]
    result = [*regrouped(iter(pieces), size)]
    assert torch.equal(torch.cat(result), torch.cat(pieces))
    assert {len(each) for each in result[:-1]} <= {size}
    assert 1 <= len(result[-1]) <= size
    assert [*regrouped(iter([]), size)] == []


def test_refusals(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(ValueError, match=r"each file must hold at least a token, .*empty.txt is empty"):
        texts_of([tmp_path / "one.txt", tmp_path / "empty.txt"], ByteTokenizer(), 1)
    with pytest.raises(ValueError, match=r"each file must hold at least 2 tokens, .*one.txt holds 1"):
        texts_of([tmp_path / "one.txt"], ByteTokenizer(), 2)
    wrong = text_of(tmp_path / "wrong.txt", b"good\nbad \xff\n")
    with pytest.raises(ValueError, match=r"files must hold text in UTF-8, .*wrong.txt does not: .* at byte 9"):
        texts_of([wrong.path], ByteTokenizer(), 1)
    with pytest.raises(ValueError, match="tokenizer must be the model's: it gives token 111, and the model has 100"):
        [*TokenReader(text_of(tmp_path / "high.txt", b"good"), ByteTokenizer(), 100)]
