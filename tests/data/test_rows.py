"""Rows: windows of a stream and packed documents, whole and in parts."""

import pytest
import torch
from held import Held, drawn
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_longnet import SequencePart
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.data.packing import PackedRows, packed
from lightning_longnet.data.rows import Cut, RowParts, Windows

PLACEMENTS = [
    Placement((5, 4, 3)),
    Placement((5, 4, 3), "zigzag"),
    Placement((1, 11)),
    Placement((2, 1, 4, 5), "zigzag"),
]


def test_windows_and_the_tokens_that_follow():
    stream = Held(drawn(50))
    rows = RowParts(Windows(stream, 12))
    assert len(rows) == 4  # the last token of 49 has one that follows
    assert torch.equal(torch.cat([rows[i]["input_ids"] for i in range(4)]), stream.tokens[:48])
    assert torch.equal(torch.cat([rows[i]["labels"] for i in range(4)]), stream.tokens[1:49])
    assert len(Windows(Held(drawn(48)), 12)) == 3
    assert len(Windows(Held(drawn(13)), 12)) == 1
    with pytest.raises(ValueError, match="tokens must be less than the 12 tokens of the data, got 12"):
        Windows(Held(drawn(12)), 12)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_rank_reads_its_tokens_and_no_others(placement):
    stream = Held(drawn(50))
    rows = Windows(stream, 12)
    whole = RowParts(rows)[2]
    for rank in range(placement.ranks):
        stream.count = 0
        part = RowParts(rows, Cut(12, placement, rank))[2]
        stretches = placement.chunks(rank)
        assert stream.count == placement.lengths[rank] + len(stretches)  # and what follows each stretch
        here = torch.cat([torch.arange(begin, end) for begin, end, _ in stretches])
        assert isinstance(part, SequencePart)
        assert (part.length, part.samples, part.tokens) == (12, (f"{rows.identity}:2",), placement.lengths[rank])
        assert set(part.tensors) == set(whole)
        assert all(torch.equal(part.tensors[name], whole[name][here]) for name in whole)


def test_a_row_past_the_end_does_not_count():
    rows = RowParts(Windows(Held(drawn(50)), 12))
    assert torch.equal(rows[5]["input_ids"], rows[1]["input_ids"])
    assert (rows[5]["labels"] == -100).all()
    assert type(rows[0]) is dict


@st.composite
def documents(draw):
    """(lengths of documents, tokens of a row)"""
    return draw(st.lists(st.integers(1, 20), min_size=1, max_size=15)), draw(st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(documents())
def test_packed_rows_hold_each_token_of_each_document_once(case):
    lengths, tokens = case
    starts = torch.tensor([0, *lengths]).cumsum(0)
    stream = Held(torch.arange(sum(lengths)) + 1, starts[:-1].tolist())
    rows = PackedRows(stream, tokens, pad=0)
    seen = []
    for i in range(len(rows)):
        row = rows.read(i, 0, tokens)
        assert {len(x) for x in row.values()} == {tokens}
        assert (row["documents"].diff() >= 0).all()
        for number in row["documents"].unique():
            here = row["input_ids"][row["documents"] == number] - 1
            targets = row["labels"][row["documents"] == number]
            if here[0] == -1:
                assert (here == -1).all()
                assert (targets == -100).all()
                continue
            seen += here.tolist()
            document = torch.searchsorted(starts, here, right=True)
            assert len(document.unique()) == 1  # of one document, and in its order
            assert (here.diff() == 1).all()
            is_last = here + 1 == starts[document]
            assert torch.equal(targets, torch.where(is_last, -100, here + 2))
            assert len(here) == tokens or here[0] in starts or here[-1] + 1 in starts
    assert sorted(seen) == list(range(sum(lengths)))


@settings(max_examples=40, deadline=None)
@given(documents(), st.data())
def test_packed_rows_in_parts(case, data):
    lengths, tokens = case
    stream = Held(drawn(sum(lengths)), torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist())
    rows = PackedRows(stream, tokens)
    i = data.draw(st.integers(0, len(rows) - 1))
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, tokens)] * 2)))
    whole = rows.read(i, 0, tokens)
    stream.count = 0
    part = rows.read(i, begin, end)
    assert all(torch.equal(part[name], whole[name][begin:end]) for name in whole)
    assert stream.count <= 2 * (end - begin)  # a target more for each document


def test_packing_leaves_little_space():
    lengths = (drawn(2000, high=1000) + 1).tolist()
    rows = packed(lengths, 1000)
    assert sorted(piece for row in rows for piece in row) == list(range(2000))
    assert max(sum(lengths[piece] for piece in row) for row in rows) <= 1000
    assert len(rows) * 1000 < 1.03 * sum(lengths)
