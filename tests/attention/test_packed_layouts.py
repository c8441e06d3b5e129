"""Packed rows of a few to thousands of documents: small blocks share calls, and each document equals itself alone."""

from contextlib import contextmanager
from itertools import product
from unittest.mock import patch

import pytest
import torch
from cells import shown_pairs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiers import tiered

from lightning_longnet import Pattern, attend
from lightning_longnet.attention.plan import batches
from lightning_longnet.attention.plan.blocks import make_plan
from lightning_longnet.attention.plan.padded import PaddedLattice
from lightning_longnet.attention.plan.parts import Parts

PATTERNS = {
    "dense": lambda causal: Pattern.dense(is_causal=causal),
    "five branches": lambda causal: Pattern.dilated((16, 32, 64, 128, 256), (1, 2, 4, 8, 16), is_causal=causal),
    "LongNet": lambda causal: Pattern.dilated((8, 24, 48), (1, 2, 4), is_causal=causal),
    "not nested": lambda causal: Pattern.dilated((10, 15), (2, 3), is_causal=causal),
    "set": lambda causal: Pattern(Pattern.dilated((10, 15, 30), (1, 3, 2), is_causal=causal).branches, "set"),
    "window": lambda causal: Pattern.window(5, is_causal=causal),
}


@st.composite
def layouts(draw, most=40):
    """Draw the lengths of the documents of each row; all rows have the same number of tokens."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    length, rows = draw(st.integers(1, 150)), []
    for _ in range(draw(st.integers(1, 3))):
        kind, many = draw(st.sampled_from(["equal", "zipf", "cuts", "ones"])), draw(st.integers(1, most))
        rows.append(lengths_of(kind, length, min(many, length), generator))
    return rows


def lengths_of(kind, length, many, generator):
    """`many` documents of at least one token each, or as many as fit if all have one length."""
    if kind == "ones":
        return [1] * (many - 1) + [length - many + 1]
    if kind == "equal":
        each = -(-length // many)
        return [each] * (length // each) + [length % each] * (length % each > 0)
    if kind == "zipf":
        shares = 1 / torch.arange(1, many + 1)
        extra = (shares / shares.sum() * (length - many)).long()
        extra[0] += length - many - extra.sum()
        return (1 + extra)[torch.randperm(many, generator=generator)].tolist()
    cuts = (torch.randperm(length - 1, generator=generator)[: many - 1] + 1).sort().values
    return torch.cat((torch.tensor([0]), cuts, torch.tensor([length]))).diff().tolist()


def ids_of(rows):
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])


def inputs(batch, length, heads, kv_heads):
    generator = torch.Generator().manual_seed(1)
    shapes = (heads, kv_heads, kv_heads)
    return [torch.randn(batch, length, h, 8, generator=generator, dtype=torch.float64).requires_grad_() for h in shapes]


def slopes(tensors):
    """A gradient of the result that differs in every element."""
    return torch.arange(tensors[0].numel(), dtype=torch.float64).mul(0.37).cos().view_as(tensors[0])


def step(tensors, pattern, **options):
    out, lse = attend(*tensors, pattern, return_lse=True, **options)
    return out, lse, *torch.autograd.grad(out, tensors, slopes(tensors))


def alone(tensors, pattern, rows, **options):
    """The result of each document alone, by the reference; documents of one length are the samples of a batch."""
    grad, result = slopes(tensors), [torch.empty_like(x) for x in (tensors[0], *tensors)]
    lse = torch.empty(tensors[0].shape[:3], dtype=torch.float64)
    places = {}
    for row, lengths in enumerate(rows):
        begin = 0
        for length in lengths:
            places.setdefault(length, []).append((row, begin))
            begin += length
    for length, firsts in places.items():
        at = (
            torch.tensor([row for row, _ in firsts])[:, None],
            torch.tensor([[b] for _, b in firsts]) + torch.arange(length),
        )
        own = [x[at].detach().requires_grad_() for x in tensors]
        out, its_lse = attend(*own, pattern, return_lse=True, kernel="reference", **options)
        for whole, part in zip(result, (out, *torch.autograd.grad(out, own, grad[at])), strict=True):
            whole[at] = part.detach()
        lse[at] = its_lse.detach().transpose(1, 2)
    return result[0], lse.transpose(1, 2), *result[1:]


@contextmanager
def joining(rows):
    """Join blocks as if a call took as long as so many rows; None joins none."""
    bounded = Parts.bounded
    if rows is None:

        def unjoined(self, limit, threads, joins, key_limit):
            return bounded(self, limit, threads, False, key_limit)

        with patch.object(Parts, "bounded", unjoined):
            yield
    else:
        with patch.object(batches, "CALL_ROWS", rows):
            yield


def assert_equal(result, truth):
    for x, y in zip(result, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(
    rows=layouts(),
    pattern=st.sampled_from(sorted(PATTERNS)),
    causal=st.booleans(),
    mix=st.sampled_from(["exact", "detached"]),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 3)]),
    kernel=st.sampled_from(["auto", "eager"]),
    call_rows=st.sampled_from([0, 64, 512, 10**6]),
)
@example(
    # of one block the gradient of q becomes the accumulator, and those of k and v do not
    rows=[[2]],
    pattern="LongNet",
    causal=False,
    mix="exact",
    heads=(1, 1),
    kernel="eager",
    call_rows=0,
)
def test_packed_documents_are_documents(rows, pattern, causal, mix, heads, kernel, call_rows):
    tensors, pattern = inputs(len(rows), sum(rows[0]), *heads), PATTERNS[pattern](causal)
    with joining(call_rows):
        result = step(tensors, pattern, documents=ids_of(rows), mix=mix, kernel=kernel)
    assert_equal(result, alone(tensors, pattern, rows, mix=mix))


@settings(max_examples=80, deadline=None)
@given(
    rows=layouts(),
    pattern=st.sampled_from(sorted(PATTERNS)),
    causal=st.booleans(),
    mix=st.sampled_from(["exact", "detached"]),
    ordering=st.sampled_from(["raster", "hilbert"]),
    dropout=st.sampled_from([0.0, 0.3]),
    every=st.integers(2, 9),
)
def test_joined_calls_are_separate_calls(rows, pattern, causal, mix, ordering, dropout, every):
    """With padding, dropout and an order of tokens."""
    tensors, pattern = inputs(len(rows), sum(rows[0]), 4, 2), PATTERNS[pattern](causal)
    if ordering != "raster" and any(branch.window for branch in pattern.branches):
        ordering = "raster"
    options = {
        "key_padding_mask": torch.arange(sum(rows[0])).expand(len(rows), -1) % every < every // 2,
        "dropout": dropout,
        "dropout_seed": 5 if dropout else None,
        "mix": mix,
        "ordering": ordering,
    }
    results = []
    for call_rows in (10**6, None):
        with joining(call_rows):
            results.append(step(tensors, pattern, documents=ids_of(rows), **options))
    assert_equal(*results)


@pytest.mark.parametrize(
    ("many", "pattern", "kind"),
    tiered(
        product([10, 1000, 4000], ["dense", "five branches"], ["equal", "zipf", "cuts", "ones"]),
        quick=[],
        long=[(10, "dense", "zipf"), (1000, "five branches", "cuts")],
    ),
)
def test_many_documents(many, pattern, kind):
    generator = torch.Generator().manual_seed(many)
    rows = [lengths_of(kind, 4096, many, generator) for _ in range(2)]
    if kind == "ones":  # no document of thousands of tokens for the reference
        rows = [[*row[:-1], *lengths_of("equal", row[-1], 1 + row[-1] // 256, generator)] for row in rows]
    if many == 10 and kind == "zipf":
        rows = [lengths_of("cuts", 4096, 40, generator) for _ in rows]
    tensors, pattern = inputs(2, 4096, 4, 4), PATTERNS[pattern](True)
    assert_equal(step(tensors, pattern, documents=ids_of(rows)), alone(tensors, pattern, rows))


@settings(max_examples=60, deadline=None)
@given(
    rows=layouts(),
    pattern=st.sampled_from(sorted(PATTERNS)),
    causal=st.booleans(),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 3)]),
    weighted=st.sampled_from([0, 1]),
    call_rows=st.sampled_from([0, 512, 10**6]),
)
def test_joined_blocks_have_the_same_pairs(rows, pattern, causal, heads, weighted, call_rows):
    cuts = (0, *torch.tensor(rows[0]).cumsum(0).tolist())
    whole = make_plan(PATTERNS[pattern](causal), *heads, cuts, weighted, 1)
    with joining(call_rows):
        joined = whole.parts.joined()
    assert pairs_of(joined) == pairs_of(whole.parts)
    assert sum(part.block.pairs * part.block.weight for part in joined) == sum(
        part.block.pairs * part.block.weight for part in whole.parts
    )


def pairs_of(parts):
    result = {}
    for part in parts:
        for *pair, count in shown_pairs(part.block):
            key = part.branch, *pair
            result[key] = result.get(key, 0) + part.block.weight * count
    return {key: count for key, count in result.items() if count}


def test_documents_of_similar_lengths_are_padded_to_one_call():
    cuts = (0, 5, 9, 12, 18, 23)
    (part,) = make_plan(Pattern.dense(is_causal=True), 2, 2, cuts, 0, 1).parts.joined()
    assert isinstance(part.block.queries, PaddedLattice)
    assert (part.block.queries.rows, sorted(part.block.queries.lengths)) == (6, [3, 4, 5, 5, 6])
    assert part.block.queries is part.block.keys
