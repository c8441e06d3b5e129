"""`AttentionSpec`: one value for all options of a call."""

import json
from dataclasses import FrozenInstanceError, fields

import pytest

from lightning_longnet import Pattern
from lightning_longnet.attention.spec import AttentionSpec

LONGNET = Pattern.dilated((4, 8, 16), (1, 2, 4), is_causal=True)
OTHERS = {
    "pattern": Pattern.dense(),
    "kernel": "eager",
    "scale": 1e-05,
    "dropout": 0.1,
    "first_sample": 3,
    "sample_step": 2,
    "mix": "detached",
    "exchange": "ring",
    "ordering": "hilbert",
    "returns_lse": True,
    "softcap": 30.0,
}


def test_it_is_frozen_and_hashable():
    spec = AttentionSpec(LONGNET, "sdpa")
    with pytest.raises(FrozenInstanceError):
        spec.scale = 1.0
    assert {spec: 1}[AttentionSpec(LONGNET, "sdpa")] == 1


@pytest.mark.parametrize("name", OTHERS)
def test_each_option_survives_its_text(name):
    spec = AttentionSpec(**{"pattern": LONGNET, "kernel": "sdpa", name: OTHERS[name]})
    plain = AttentionSpec(LONGNET, "sdpa")
    assert json.loads(spec.dumps())
    assert AttentionSpec.loads(spec.dumps()) == spec != plain
    assert spec.dumps() != plain.dumps()
    assert AttentionSpec.loads(spec.dumps()) is AttentionSpec.loads(spec.dumps())


def test_every_option_is_looked_at():
    assert set(OTHERS) == {field.name for field in fields(AttentionSpec)}


def test_pairs_are_computed_once_where_nothing_needs_the_branches():
    spec = AttentionSpec(LONGNET, "sdpa")
    assert spec.weighted_segments("cpu", samples=1, threads=4) == 4
    assert spec.weighted_segments("cpu", samples=3, threads=4) == 2
    assert spec.weighted_segments("cuda", samples=1, threads=4) == 0  # a bias takes blocks from flash attention there
    assert spec.weighted_segments("cpu", samples=1, threads=4, per_branch=True) == 0
    assert AttentionSpec(LONGNET, "eager").weighted_segments("cpu", samples=1, threads=4) == 0
    assert AttentionSpec(LONGNET, "reference").weighted_segments("cpu", samples=1, threads=4) == 0
    assert AttentionSpec(LONGNET, "sdpa", dropout=0.5).weighted_segments("cpu", samples=1, threads=4) == 0
