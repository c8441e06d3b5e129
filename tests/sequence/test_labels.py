"""Labels are cut as a sequence where they are one beyond doubt, and refused where their size alone speaks for it."""

import pytest
import torch

from lightning_longnet import SequenceContext
from lightning_longnet.sequence.parts import SequencePart
from lightning_longnet.sequence.position import MeshPosition

IDS = torch.arange(12).reshape(2, 6)
X = torch.randn(2, 6, 3)


def part(batch, dims=None):
    """The part of the first of two ranks."""
    return SequenceContext(position=MeshPosition(2, 0)).split(batch, dims)


@pytest.mark.parametrize(
    ("batch", "dims"),
    [
        ({"x": X, "labels": IDS}, {"x": 1}),  # six classes, or six tokens
        ({"x": X, "attention_mask": torch.ones(2, 6), "labels": IDS}, {"x": 1}),
        ({"x": {"values": X}, "y": {"labels": IDS}}, {"values": 1}),
        ({"input_ids": IDS, "labels": torch.zeros(2, 6)}, None),  # a number for each of six classes
        ({"input_ids": IDS, "labels": IDS > 3}, None),
        ({"input_ids": IDS.new_zeros(6, 6), "labels": IDS.new_zeros(6, 6)}, {"input_ids": 0}),
        ({"x": X, "labels": torch.zeros(2, 6, 1)}, {"x": 1}),
        ({"documents": torch.zeros(2, 6).long(), "labels": torch.zeros(2, 6)}, None),
    ],
)
def test_labels_that_may_be_of_samples_are_refused(batch, dims):
    with pytest.raises(
        ValueError, match=r"may be of the tokens or of the samples.*\{'labels': 1\}.*\{'labels': None\}"
    ):
        part(batch, dims)
    assert SequenceContext().split(batch, dims) is batch  # nothing is cut


@pytest.mark.parametrize(
    ("batch", "dims", "tokens"),
    [
        ({"input_ids": IDS, "labels": IDS}, None, 3),
        ({"labels": IDS}, None, 3),
        ({"documents": torch.arange(6), "labels": IDS}, None, 3),
        ({"labels": IDS, "attention_mask": torch.ones(2, 6)}, None, 3),
        ({"input_ids": IDS, "x": X, "labels": IDS}, {"x": 1}, 3),
        ({"x": X, "labels": IDS}, {"x": 1, "labels": 1}, 3),
        ({"x": X, "labels": IDS}, {"x": 1, "labels": None}, 6),
        ({"input_ids": IDS, "labels": torch.zeros(2, 6)}, {"labels": None}, 6),
        ({"input_ids": IDS, "labels": torch.zeros(2, 6)}, {"labels": 1}, 3),
        ({"input_ids": IDS, "labels": torch.zeros(2, 6, 4)}, None, 3),  # a distribution for each token
    ],
)
def test_labels_that_are_known_or_declared_are_cut_or_left(batch, dims, tokens):
    assert part(batch, dims)["labels"].shape[1] == tokens


def test_labels_of_another_size_say_what_to_declare():
    with pytest.raises(ValueError, match=r"got x 6, labels 4.*sequence_dims = \{'labels': None\}"):
        part({"x": X, "labels": IDS[:, :4]}, {"x": 1})


def test_labels_that_were_cut_when_they_were_read_are_not_asked_about():
    tensors = {"x": X[:, :3], "labels": IDS[:, :3]}
    result = part(SequencePart(tensors, 6, ((0, 3),), ("a", "b")), {"x": 1})
    assert result["labels"].shape == (2, 3)
