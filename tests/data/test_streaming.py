"""Rows of a stream without a length: the same for any number of ranks and of worker processes."""

from functools import partial

import pytest
import torch
from held import drawn
from torch.utils.data import DataLoader

from lightning_longnet import SequencePart
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.data.rows import Cut
from lightning_longnet.data.streaming import StreamedRows, windows

TOKENS = 6


def texts(sizes):
    return drawn(sum(sizes)).split(list(sizes))


SIZES = (1, 30, 2, 2, 9, 0, 45, 3)  # 92 tokens: 15 rows


def global_batches(batch_size, replicas, workers=0, sizes=SIZES, **options):
    result = []
    for rank in range(replicas):
        rows = StreamedRows(partial(texts, sizes), "texts", TOKENS, batch_size, replicas, rank, **options)
        result.append([batch["input_ids"] for batch in DataLoader(rows, batch_size, num_workers=workers)])
    assert len({len(batches) for batches in result}) == 1
    return [torch.stack(each, 1).flatten(0, 1) for each in zip(*result, strict=True)]


def test_windows_are_those_of_the_whole():
    whole = torch.cat(texts(SIZES))
    result = list(windows(texts(SIZES), TOKENS))
    assert len(result) == (len(whole) - 1) // TOKENS
    for i, window in enumerate(result):
        assert torch.equal(window, whole[i * TOKENS : (i + 1) * TOKENS + 1])


def test_the_same_global_batches_for_any_ranks_and_workers():
    expected = torch.cat(texts(SIZES))[: 12 * TOKENS].view(3, 4, TOKENS)
    for batch_size, replicas, workers in [(4, 1, 0), (2, 2, 0), (1, 4, 0), (4, 1, 2), (2, 2, 2)]:
        result = global_batches(batch_size, replicas, workers)
        assert torch.equal(torch.stack(result), expected), (batch_size, replicas, workers)


@pytest.mark.parametrize(("batch_size", "replicas", "ignored"), [(8, 1, 0), (4, 2, 1), (2, 4, 1)])
def test_the_last_rows_count_once_where_they_are_kept(batch_size, replicas, ignored):
    rows = [
        StreamedRows(partial(texts, SIZES), "texts", TOKENS, batch_size, replicas, rank, drop_last=False)
        for rank in range(replicas)
    ]
    result = [list(each) for each in rows]
    assert len({len(each) for each in result}) == 1
    counted = [row for each in result for row in each if (row["labels"] != -100).all()]
    assert len({tuple(row["input_ids"].tolist()) for row in counted}) == len(counted) == 15
    assert sum(map(len, result)) == 15 + ignored


def test_a_rank_is_given_its_part():
    cut = Cut(TOKENS, Placement((3, 3), "zigzag"), 1)
    whole = list(StreamedRows(partial(texts, SIZES), "texts", TOKENS, 5))
    parts = list(StreamedRows(partial(texts, SIZES), "texts", TOKENS, 5, cut=cut))
    assert all(isinstance(part, SequencePart) for part in parts)
    assert [part.samples for part in parts] == [(f"texts:{i}",) for i in range(15)]
    for row, part in zip(whole, parts, strict=True):
        assert torch.equal(part.tensors["labels"], row["labels"][[2, 3, 4]])


def test_a_stream_that_is_too_short():
    with pytest.raises(ValueError, match="tokens must be less than those of the stream, got 6"):
        list(StreamedRows(partial(texts, [6]), "texts", TOKENS, 1))
    with pytest.raises(ValueError, match=r"batch_size must leave a batch for each of the 2 groups .* has 15 rows"):
        list(StreamedRows(partial(texts, SIZES), "texts", TOKENS, 8, 2))
