"""Text that appears token by token is the text of all tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_longnet.data.tokenizers import ByteTokenizer
from lightning_longnet.inference.text import TextStream

TOKENIZER = ByteTokenizer()


def parts(ids, stops=()):
    stream = TextStream(TOKENIZER.decode, stops)
    result = []
    for token in ids:
        result.append(stream.add(token))
        if stream.is_stopped:
            return result
    return [*result, stream.end()]


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 300), max_size=200) | st.text(max_size=120).map(TOKENIZER.encode))
def test_the_parts_are_the_whole(ids):
    assert "".join(parts(ids)) == TOKENIZER.decode(ids)


def test_characters_appear_whole_and_at_once():
    text = "a\N{EURO SIGN}b\N{GRINNING FACE}"
    assert parts(TOKENIZER.encode(text)) == ["a", "", "", "\N{EURO SIGN}", "b", "", "", "", "\N{GRINNING FACE}", ""]


def test_tokens_of_words_with_their_blanks():
    """As SentencePiece decodes: no blank before the first word, which is another one after a cut."""
    words = [f" w{i}" for i in range(500)]
    stream = TextStream(lambda ids: "".join(words[i] for i in ids).removeprefix(" "))
    result = [stream.add(i) for i in range(500)] + [stream.end()]
    assert "".join(result) == "".join(words).removeprefix(" ")


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("one\ntwo\n", ["\n\n"], "one\ntwo\n"),
        ("ababac", ["abac"], "ab"),
        ("xendy", ["endz", "dy"], "xen"),
        ("stop", ["stop"], ""),
        ("a sto", ["stop"], "a sto"),
    ],
)
def test_nothing_of_a_stop_text_appears(text, stops, expected):
    result = parts(TOKENIZER.encode(text), stops)
    assert "".join(result) == expected
    shown = ""
    for part in result:
        shown += part
        assert expected.startswith(shown)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_text_ends_where_the_first_stop_text_is_complete(data):
    """Wherever the borders of its tokens are."""
    words = st.text("ab\N{EURO SIGN}", min_size=1, max_size=5)
    pieces, stops = data.draw(st.lists(words, max_size=12)), data.draw(st.lists(words, min_size=1, max_size=3))
    whole = "".join(pieces)
    ends = [(i + len(stop), i) for stop in stops for i in range(len(whole)) if whole.startswith(stop, i)]
    expected = whole[: min(ends)[1]] if ends else whole
    stream = TextStream(lambda ids: "".join(pieces[i] for i in ids), stops)
    shown, taken = "", 0
    for i in range(len(pieces)):
        shown += stream.add(i)
        taken += len(pieces[i])
        assert expected.startswith(shown)
        assert stream.is_stopped == (bool(ends) and taken >= min(ends)[0])
    assert shown + stream.end() == expected


def test_an_empty_stop_text_is_refused():
    with pytest.raises(ValueError, match="stops must be texts of at least one character"):
        TextStream(TOKENIZER.decode, [""])
