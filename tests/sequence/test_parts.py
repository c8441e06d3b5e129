"""Batches that were cut when they were read: taken as they are, and compared by the names of their samples."""

import copy
import pickle

import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from test_context import made
from torch.utils.data import DataLoader, default_collate
from torch.utils.data._utils.pin_memory import pin_memory

from lightning_longnet import SequenceContext, SequencePart
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.sequence.batches import digest

LENGTH = 11


def whole_batch(samples=(0, 1), length=LENGTH):
    ids = torch.stack([torch.arange(length) + 100 * sample for sample in samples])
    return {"input_ids": ids, "documents": ids % 100 // 4, "attention_mask": (ids % 100 < length - 2).long()}


def part_of_batch(context, samples=(0, 1), length=LENGTH, rank=None):
    rank = context.sequence_parallel_rank if rank is None else rank
    stretches = context.placement_of(length).chunks(rank)
    here = torch.cat([torch.arange(begin, end) for begin, end, _ in stretches])
    values = {name: x[:, here] for name, x in whole_batch(samples, length).items()}
    return SequencePart(values, length, stretches, [f"it:{sample}" for sample in samples])


def masks_of(context):
    return context._splitter.current.documents, context._splitter.current.key_padding_mask


def as_if_cut_here(group, placement):
    """A context is in the same state, and made the same batch, as where it was handed the whole."""
    context = made(group, placement)
    expected = context.split(whole_batch())
    positions, given = context.positions, masks_of(context)
    context.begin(None)
    part = part_of_batch(context)
    context.check_same(part)
    result = context.split(part)
    assert type(result) is dict
    assert set(result) == set(expected)
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    assert context.length == LENGTH
    assert torch.equal(context.positions, positions)
    for a, b in zip(masks_of(context), given, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert context.shard is context.shard  # made with documents and padding, by all ranks


@pytest.mark.parametrize("placement", ["contiguous", "zigzag"])
def test_the_same_as_a_whole_batch_that_is_cut(pool, placement):
    for world in (1, 2, 3):
        pool.run(world, as_if_cut_here, placement)


def different(group, case):
    context = made(group)
    rank = context.sequence_parallel_rank
    if case == "samples":
        batch = part_of_batch(context, (0, rank))
    elif case == "length":
        batch = part_of_batch(context, length=LENGTH + rank)
    elif case == "cut" and rank == 1:
        batch = part_of_batch(context, rank=0)
    elif case == "tokens" and rank == 1:
        part = part_of_batch(context)
        batch = SequencePart({name: x[:, 1:] for name, x in part.tensors.items()}, LENGTH, part.stretches, part.samples)
    elif case == "whole" and rank == 1:
        batch = whole_batch()
    else:
        batch = part_of_batch(context)
    context.check_same(batch)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("samples", "ranks that share sequences must be given the same batches"),
        ("length", "ranks that share sequences must be given the same batches"),
        ("whole", "ranks that share sequences must be given the same batches"),
        (
            "cut",
            "a SequencePart must hold the tokens 3 to 7 of 11 on rank 1 of the 3 that share a sequence, got 0 to 3",
        ),
        ("tokens", "a SequencePart of 4 tokens must have as many in its tensors, got 3"),
    ],
)
def test_what_does_not_fit_is_an_error_on_all_ranks(pool, case, message):
    result = pool.outcomes(3, different, case)
    assert [fine for fine, _ in result] == [False] * 3
    assert all(error[0] is ValueError for _, error in result)
    shown = [error[1] for _, error in result]
    assert message in shown[1], shown
    if case in ("samples", "length", "whole"):
        assert all(message in each for each in shown)
    else:
        assert all("were given a batch that does not fit" in shown[rank] for rank in (0, 2))


def refused_at_once(group):
    """Also after the first batch, which alone is compared: by the rank that holds another part."""
    context = made(group)
    with pytest.raises(ValueError, match="a SequencePart must hold the tokens"):
        context.split(part_of_batch(context, rank=1 - context.sequence_parallel_rank))
    with pytest.raises(ValueError, match="inside is a SequencePart, which must be the whole batch"):
        context.split({"inside": part_of_batch(context), "input_ids": torch.zeros(2, LENGTH)})
    with pytest.raises(ValueError, match="sequences must have at least one token for each of the 2 ranks"):
        context.split(SequencePart({"input_ids": torch.zeros(2, 1)}, 1, [(0, 1)], "ab"))


def test_a_part_of_another_rank_is_refused(pool):
    pool.run(2, refused_at_once)


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return SequencePart({"input_ids": torch.arange(2, 6) + i}, 9, [(2, 4), (7, 9)], [f"it:{i}"])


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_keep_what_is_said_of_it(workers):
    (batch,) = DataLoader(Samples(), batch_size=4, num_workers=workers)
    assert (batch.length, batch.stretches) == (9, ((2, 4), (7, 9)))
    assert batch.samples == ("it:0", "it:1", "it:2", "it:3")
    assert torch.equal(batch.tensors["input_ids"], torch.arange(2, 6) + torch.arange(4)[:, None])


def test_copies_keep_what_is_said_of_it(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x + 1)  # there is no GPU to pin for
    part = SequencePart({"input_ids": torch.arange(4)}, 9, [(0, 4)], ["a"])
    mapped = apply_to_collection(part, torch.Tensor, torch.clone)  # as plugins for precisions do
    for result in (copy.copy(part), pickle.loads(pickle.dumps(part)), part.to("cpu"), pin_memory(part), mapped):
        assert isinstance(result, SequencePart)
        assert (result.length, result.stretches, result.samples) == (9, ((0, 4),), ("a",))
    assert pin_memory(part).tensors["input_ids"].tolist() == [1, 2, 3, 4]
    assert part.tensors["input_ids"].tolist() == [0, 1, 2, 3]


def test_parts_that_are_cut_otherwise_make_no_batch():
    parts = [Samples()[0], SequencePart({"input_ids": torch.arange(4)}, 9, [(0, 4)], ["b"])]
    with pytest.raises(ValueError, match="cut alike, got 2 to 4 and 7 to 9 of 9 and 0 to 4 of 9"):
        default_collate(parts)


def test_digests_are_of_samples_and_not_of_values():
    def part(length=9, samples=("a", "b"), shift=0, dtype=torch.int64, name="input_ids"):
        return SequencePart({name: (torch.arange(4) + shift).to(dtype)}, length, [(0, 4)], samples)

    assert digest(part()) == digest(part(shift=3))
    others = [part(), part(10), part(samples=("b", "a")), part(dtype=torch.int32), part(name="labels")]
    assert len({digest(each) for each in others}) == 5


def test_alone_it_is_a_whole():
    context = SequenceContext()
    part = SequencePart({"input_ids": torch.zeros(1, 6)}, 6, [(0, 6)], ["a"])
    assert type(context.split(part)) is dict
    assert context.length == 6
    with pytest.raises(ValueError, match="must hold the tokens 0 to 6 of 6 on rank 0 of the 1"):
        context.split(SequencePart({"input_ids": torch.zeros(1, 3)}, 6, [(0, 3)], ["a"]))
    assert Placement((6,)).chunks(0)
