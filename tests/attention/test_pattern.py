"""Patterns as values: their mask, their reach, their sums, how they are written down and drawn."""

import pickle

import brute
import drawn
import matplotlib
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from lightning_longnet import Branch, Pattern


@settings(max_examples=60, deadline=None)
@given(
    shown=st.lists(drawn.branches(), min_size=1, max_size=3),
    multiplicity=st.sampled_from(["multiset", "set"]),
    length=st.integers(1, 20),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 3),
)
def test_the_mask_counts_what_the_definition_shows(shown, multiplicity, length, kv_heads, group):
    counts = drawn.pattern_of(shown, multiplicity).mask(length, kv_heads * group, kv_heads)
    truth = sum(brute.counts(shown, multiplicity, length, kv_heads)).repeat_interleave(group, 0)
    assert torch.equal(counts.double(), truth)


def test_windows_and_dense_patterns_are_what_they_say():
    i = torch.arange(9)
    apart = i[:, None] - i
    assert torch.equal(Pattern.dense().mask(9, 1)[0], torch.ones(9, 9).long())
    assert torch.equal(Pattern.dense(is_causal=True).mask(9, 1)[0] == 1, apart >= 0)
    assert torch.equal(Pattern.window(3).mask(9, 1)[0] == 1, apart.abs() < 3)
    assert torch.equal(Pattern.window(3, is_causal=True).mask(9, 1)[0] == 1, (apart >= 0) & (apart < 3))


def test_a_sum_shows_what_both_show():
    a, b = Pattern.window(3), Pattern.dilated((4, 8), (1, 2))
    assert torch.equal((a + b).mask(11, 2), a.mask(11, 2) + b.mask(11, 2))
    once = Pattern(a.branches, "set") + Pattern(b.branches, "set")
    assert torch.equal(once.mask(11, 2), (a + b).mask(11, 2).clamp(max=1))
    assert not (a + Pattern.dense(is_causal=True)).is_causal


def test_patterns_are_values():
    a, b = (Pattern.dilated([4, 8], [1, 2], is_causal=True) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert {a: 1}[b] == 1
    assert a != Pattern.dilated([4, 8], [1, 2])
    assert a == Pattern.dilated(np.array([4, 8]), np.array([1, 2]), is_causal=True)
    assert pickle.loads(pickle.dumps(a)) == a
    assert pickle.loads(pickle.dumps(a)).dumps() == a.dumps()
    with pytest.raises(AttributeError):
        a.multiplicity = "set"


def test_patterns_are_written_in_yaml():
    pattern = Pattern.dilated((4, 8), (1, 2), True, "blocked", "set") + Pattern((Branch(window=3),), "set")
    assert Pattern(**yaml.safe_load(yaml.safe_dump(pattern.to_dict()))) == pattern
    assert Pattern.loads(pattern.dumps()) == pattern
    parser = ArgumentParser()
    parser.add_argument("--pattern", type=Pattern)
    parsed = parser.parse_object({"pattern": pattern.to_dict()})
    assert parser.instantiate(parsed).pattern == pattern


def test_reach_reports_borders_that_nothing_crosses_and_residues_that_no_head_serves():
    longnet = Pattern.dilated((4, 8), (1, 4), is_causal=True)
    assert not longnet.reach(8, heads=4).has_gaps
    short = longnet.reach(20, heads=4)
    assert (short.span, short.unserved) == (8, ())
    assert "Nothing crosses a multiple of 8 tokens" in str(short)
    few = longnet.reach(8, heads=6, kv_heads=2)
    assert few.unserved == ((longnet.branches[1], (2, 3)),)
    assert "no head attends to 2 of its 4 residues (2, 3)" in str(few)
    assert longnet.reach(20, heads=4).has_gaps
    assert (longnet + Pattern.window(2)).reach(20, heads=4).span == 20
    assert (longnet + Pattern.window(1)).reach(20, heads=4).span == 8
    assert not Pattern.dense().reach(20, heads=1).has_gaps
    assert Pattern.dilated((4, 6), (1, 1)).reach(100, heads=1).span == 12
    assert Pattern.dilated((4, 8), (1, 8)).reach(20, heads=8).span == 4  # one row a segment connects nothing
    assert str(Pattern.dense().reach(20, heads=1)) == "No border in 20 tokens, and a head for every residue."


@settings(max_examples=60, deadline=None)
@given(pattern=drawn.nested_branches(), kv_heads=st.integers(1, 4), length=st.integers(1, 40))
def test_no_depth_carries_anything_over_a_border(pattern, kv_heads, length):
    """Against the closure of the mask itself."""
    pattern = drawn.pattern_of(pattern, "multiset")
    reached = (pattern.mask(length, kv_heads).sum(0) + torch.eye(length) > 0).double()
    for _ in range(6):
        reached = (reached @ reached > 0).double()
    span = pattern.reach(length, kv_heads).span
    i = torch.arange(length)
    assert not reached[i[:, None] // span != i // span].any()


def test_plots_show_each_distinct_head_once():
    matplotlib.use("agg")
    figure = Pattern.dilated((8, 16), (1, 2), is_causal=True).plot(16, heads=4)
    figure.canvas.draw()
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["heads 0, 2", "heads 1, 3"]
    assert figure.get_suptitle() == "(8, 1) + (16, 2), causal"
    drawn_counts = figure.axes[0].images[0].get_array()
    assert torch.equal(torch.as_tensor(drawn_counts), Pattern.dilated((8, 16), (1, 2), True).mask(16, 4)[0])
    many = Pattern.dilated((32,), (8,)).plot()
    assert "(4 more kinds of head)" in many.get_suptitle()
    assert len(Pattern.dense().plot(4, heads=2).axes) == 2
