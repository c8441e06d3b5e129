"""Tasks whose answers stand far back: a brute reader finds each of them, and no nearer than is said."""

import math

import pytest
import torch
from tiers import tiered

from lightning_longnet import LongRangeData, TokenData

CASES = [
    ("recall", 64, 30, 6),
    ("recall", 41, 30, 4),
    ("recall2", 64, 30, 6),
    ("recall2", 41, 30, 4),
    ("needle", 50, 33, 1),
    ("copy", 50, 20, 7),
    ("copy", 40, 20, 20),
]


def made(task, tokens, distance, items, **options):
    """`recall2` is recall with pairs of two tokens."""
    options = {"pair_tokens": 2 if task == "recall2" else 1, **options}
    task = task.removesuffix("2")
    data = LongRangeData(task, tokens, distance, 4, items=items, samples=200, validation_samples=50, **options)
    data.setup("fit")
    return data


def answered(task, ids, asking, distance, answers, items):
    """(answer, how far back it stands) for a question, read off the tokens up to it."""
    before = ids[: asking + 1].tolist()
    if task == "recall":  # the pair's number is that of its key and its answer
        first = 2 + answers + items
        key = before[asking] - 2 - answers
        (place,) = (i for i, token in enumerate(before) if token >= first and (token - first) // answers == key)
        return (before[place] - first) % answers + 2, asking - place
    if task == "recall2":
        place = before.index(before[asking]) + 1
    elif task == "needle":
        place = before.index(1) + 1
    else:
        place = asking - distance
    assert 2 <= before[place] < 2 + answers
    return before[place], asking - place


@pytest.mark.parametrize(("task", "tokens", "distance", "items"), CASES)
def test_answers_stand_where_they_are_said_to(task, tokens, distance, items):
    data = made(task, tokens, distance, items)
    begins = set()
    for batch in data.val_dataloader():
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            asking = (labels != -100).nonzero().flatten().tolist()
            assert len(asking) == (1 if task == "needle" else items)
            begins.add(asking[0])
            if task == "copy":
                assert ids[asking].tolist() == [1, *labels[asking[:-1]].tolist()]  # the one before is shown
            for place in asking:
                answer, back = answered(task, ids, place, distance, data.answers, items)
                assert answer == labels[place]
                assert back >= distance if "recall" in task else back == distance
            assert int(ids.max()) < data.vocab_size
    assert len(begins) > 1 or data.val_rows.span == tokens
    if "recall" in task:  # the nearest is as near as is said
        nearest = min(
            answered(task, row["input_ids"], int(i), distance, 8, items)[1]
            for n in range(60)
            for row in [data.train_rows.read(n, 0, tokens)]
            for i in (row["labels"] != -100).nonzero()
        )
        assert nearest == distance


@pytest.mark.parametrize("task", tiered(["recall", "recall2", "needle", "copy"], quick=["recall"]))
def test_nothing_nearer_says_the_answer(task):
    """Who has the `distance - 1` tokens before a question, and the question, is right as often as by chance."""
    data = made(task, 64, 30, 4, answers=4)
    seen = {}
    for i in range(6000):
        row = data.train_rows.read(i, 0, 64)
        place = int((row["labels"] != -100).nonzero()[0])
        window = row["input_ids"][place - 1 : place + 1]  # what a table can be made of: the question and its neighbour
        seen.setdefault(tuple(window.tolist()), torch.zeros(4))[row["labels"][place] - 2] += 1
        near = row["input_ids"][place - 29 : place + 1]
        if "recall" in task:
            assert not (((near >= 2) & (near < 6)) | (near >= 10)).any()
    right = sum(counts.max() for counts in seen.values()) / 6000
    assert right < data.chance + 0.04
    assert data.chance == 0.25
    assert data.unigram_bits == math.log2(4)


def test_rows_go_by_seed_and_number():
    data, again, other = made("recall", 64, 30, 4), made("recall", 64, 30, 4), made("recall", 64, 30, 4, seed=1)

    def row(rows, i, *stretch):
        return rows.read(i, *(stretch or (0, 64)))["input_ids"].tolist()

    assert row(data.train_rows, 3) == row(again.train_rows, 3)
    result = [row(data.train_rows, 3), row(data.train_rows, 4), row(data.val_rows, 3), row(other.train_rows, 3)]
    assert len({tuple(each) for each in result}) == 4
    assert row(data.train_rows, 3, 20, 50) == result[0][20:50]
    assert data.train_rows.identity != other.train_rows.identity != data.val_rows.identity


def test_words():
    data = made("recall", 64, 30, 4)
    assert isinstance(data, TokenData)
    assert data.decode(torch.tensor([0, 1, 2, 9, 10, 13, 14, 45])) == ". ? a0 a7 k0 k3 k0a0 k3a7"
    assert data.encode(". ? a0 a7 k0 k3 k3a7").tolist() == [0, 1, 2, 9, 10, 13, 45]
    assert data.decode(torch.tensor([2, 46, 400])) == "a0 \ufffd \ufffd", "a model may know more tokens"
    with pytest.raises(ValueError, match=r"text must be words of .* got 'b'"):
        data.encode("a0 b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "find"}, "task must be one of 'recall', 'needle', 'copy', got 'find'"),
        ({"distance": 1010}, "tokens must be at least 1,025 for this task and distance 1,010, got 1,024"),
        ({"task": "copy", "distance": 4}, "distance must be at least the 8 items of a copy, got 4"),
        ({"pair_tokens": 3}, "pair_tokens must be 1 or 2, got 3"),
        ({"answers": 1}, "answers must be at least 2, got 1"),
        ({"distance": 0}, "distance must be a positive integer, got 0"),
    ],
)
def test_what_does_not_fit_is_reported_in_a_line(options, message):
    with pytest.raises(ValueError, match=message):
        LongRangeData(**options)
