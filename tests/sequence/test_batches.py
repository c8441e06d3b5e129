"""Batches of any shape are split leaf by leaf, and nothing of them is guessed."""

import copy
import pickle
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field

import pytest
import torch

from lightning_longnet import SequenceContext
from lightning_longnet.sequence.batches import checked_dims, digest, dim_of, known_length, length_of, map_tensors

IDS = torch.arange(12).reshape(2, 6)
Pair = namedtuple("Pair", ["input_ids", "labels"])


@dataclass(frozen=True)
class Sample:
    input_ids: torch.Tensor
    name: str
    scores: torch.Tensor
    made: list = field(init=False, default_factory=list)


def halves(batch, dims=None):
    """The first three tokens of each sequence."""
    dims = dims or {}
    length = length_of(batch, dims)

    def part(path, x):
        dim = dim_of(path, x, dims)
        return x if dim is None else x.narrow(dim, 0, length // 2)

    return map_tensors(batch, part)


@pytest.mark.parametrize(
    ("batch", "dims", "at"),
    [
        ({"input_ids": IDS, "n": 3}, {}, lambda b: b["input_ids"]),
        (OrderedDict(input_ids=IDS), {}, lambda b: b["input_ids"]),
        (UserDict({"input_ids": IDS}), {}, lambda b: b["input_ids"]),
        ({"text": {"input_ids": IDS}}, {}, lambda b: b["text"]["input_ids"]),
        ({"input_ids": [IDS, IDS]}, {}, lambda b: b["input_ids"][1]),
        ([IDS, torch.ones(2)], {"0": 1, "1": None}, lambda b: b[0]),
        ((IDS, IDS), {0: 1, 1: -1}, lambda b: b[1]),
        (IDS, {"batch": 1}, lambda b: b),
        (Pair(IDS, IDS), {}, lambda b: b.labels),
        (Sample(IDS, "a", torch.ones(2)), {"scores": None}, lambda b: b.input_ids),
        ({"x": {"ids": IDS}, "y": {"ids": IDS.T}}, {"x.ids": 1, "y.ids": 0}, lambda b: b["y"]["ids"].T),
        ({"documents": torch.arange(6), "labels": IDS}, {}, lambda b: b["labels"]),
        ({"input_ids": IDS[..., None].expand(2, 6, 4)}, {}, lambda b: b["input_ids"][..., 0]),
        ({"pixels": IDS.reshape(2, 1, 6), "input_ids": IDS}, {"pixels": 2}, lambda b: b["pixels"][:, 0]),
        ({"input_ids": IDS, "step": torch.tensor(4)}, {}, lambda b: b["input_ids"]),
        ({"input_ids": IDS, "position_ids": IDS}, {}, lambda b: b["position_ids"]),
        ({"position_ids": torch.arange(6), "shift_labels": IDS}, {}, lambda b: b["shift_labels"]),
    ],
)
def test_each_kind_of_batch(batch, dims, at):
    before = pickle.dumps(batch)
    result = halves(batch, checked_dims(dims))
    assert type(result) is type(batch)
    assert torch.equal(at(result), IDS[:, :3])
    assert pickle.dumps(batch) == before


@pytest.mark.parametrize(
    ("batch", "dims", "message"),
    [
        ({"input_ids": IDS, "ages": torch.ones(2)}, {}, r"ages of shape \(2,\) is a tensor that nothing is known of"),
        ({"labels": torch.ones(2)}, {}, r"labels is to be split along dimension 1, and has shape \(2,\)"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, {}, "attention_mask of shape .* nothing is known of"),
        ({"positions": torch.ones(2, 6, 3)}, {}, "positions of shape .* nothing is known of"),
        ({"labels": {"kind": IDS}}, {}, r"labels.kind of shape \(2, 6\) is a tensor that nothing is known of"),
        ([IDS], {}, r"0 of shape \(2, 6\) is a tensor that nothing is known of.*\{'0': 1\}"),
        (
            (IDS, IDS, torch.ones(2)),
            {"1": 1},
            r"^0 of shape \(2, 6\), 2 of shape \(2,\) are tensors that nothing is known of: .* which of their "
            r"dimensions is the sequence, sequence_dims = \{'0': 1, '2': None\}, or None where they have none$",
        ),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, {}, "same number of tokens, got input_ids 6, labels 5"),
        ({"age": torch.ones(2)}, {"age": None}, "no tensor with a sequence"),
        ({"input_ids": IDS}, {"input_ids": 2}, "along dimension 2, and has shape"),
    ],
)
def test_what_is_not_known_is_an_error(batch, dims, message):
    with pytest.raises(ValueError, match=message):
        halves(batch, dims)


def test_an_object_that_hides_tensors_is_refused():
    class Graph:
        def __init__(self):
            self.nodes = IDS

    batch = {"graph": Graph(), "input_ids": IDS}
    with pytest.raises(ValueError, match="graph is a Graph, which cannot be split"):
        map_tensors(batch, lambda _, x: x)
    assert SequenceContext().split(batch) is batch  # nothing has to be split


@pytest.mark.parametrize("dims", [["input_ids"], {"input_ids": "1"}, {"input_ids": True}, {(1,): 1}, 3])
def test_declarations_are_checked(dims):
    with pytest.raises(ValueError, match="sequence_dims must map names to dimensions"):
        checked_dims(dims)


def test_a_whole_batch_is_never_refused_for_what_is_unknown():
    assert known_length({"input_ids": IDS, "ages": torch.ones(2)}, {}) == 6
    assert known_length({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 6, 6)}, {}) == 6
    assert known_length({"ages": torch.ones(2)}, {}) is None
    assert known_length({"input_ids": IDS, "labels": IDS[:, 1:]}, {}) is None
    context = SequenceContext()
    batch = {"input_ids": IDS, "ages": torch.ones(2)}
    assert context.split(batch) is batch
    assert torch.equal(context.positions, torch.arange(6))


def test_digests_tell_batches_apart():
    batch = {"input_ids": IDS, "x": torch.randn(2, 3).bfloat16(), "flags": IDS > 3}
    assert digest(batch) == digest(copy.deepcopy(batch))
    others = [
        {**batch, "input_ids": IDS.T.contiguous()},
        {**batch, "input_ids": IDS.int()},
        {**batch, "flags": IDS > 4},
        {**batch, "x": -batch["x"]},
        {"ids": IDS, "x": batch["x"], "flags": batch["flags"]},
        {**batch, "input_ids": IDS.reshape(3, 4)},
    ]
    assert len({digest(each) for each in (batch, *others)}) == 7
