"""The message for a checkpoint of another model."""

import pytest

from lightning_longnet.checkpointing.comparison import check_same_model

SHAPES = {"a.weight": (4, 2), "a.bias": (4,)}
CASES = {
    "shape": ({**SHAPES, "a.bias": (5,)}, True, r"a\.bias is \(5,\) in the checkpoint and \(4,\) in the model;"),
    "missing": ({"a.weight": (4, 2)}, True, r"the checkpoint lacks a\.bias;"),
    "surplus": ({**SHAPES, "b": (1,), "c": (1,)}, True, "the model lacks b and 1 more;"),
    "other names": ({"b": (1,)}, True, r"the checkpoint lacks a\.weight and 1 more and the model lacks b;"),
    "shape where names may differ": ({"a.bias": (5,)}, False, r"a\.bias is \(5,\)"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_difference_is_named(name):
    saved, strict, said = CASES[name]
    with pytest.raises(ValueError, match=rf"got x\.ckpt: {said}"):
        check_same_model("x.ckpt", saved, SHAPES, (None, None), strict)


def test_equal_weights_are_taken():
    check_same_model("x.ckpt", SHAPES, dict(SHAPES), ({"lr": 1}, {"lr": 2}))
    check_same_model("x.ckpt", {"b": (1,)}, SHAPES, (None, None), strict=False)


def test_hyper_parameters_explain_the_difference():
    theirs, ours = {"lr": 1, "config": {"dim": 8, "heads": 2}}, {"lr": 2, "config": {"dim": 4, "heads": 2}}
    with pytest.raises(ValueError, match=r"the checkpoint's model has config\.dim 8, and this one 4; .* give"):
        check_same_model("x.ckpt", {}, SHAPES, (theirs, ours))
