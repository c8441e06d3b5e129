"""Attention by steps with a cache equals attention to the whole text, and the cache keeps what later tokens see."""

import os
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from drawn import branches, nested_branches, pattern_of
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_longnet import Pattern, attend
from lightning_longnet.inference import branch_attention, layer
from lightning_longnet.inference.cache import DilatedCache
from lightning_longnet.models.blocks import BlocksConfig


@st.composite
def patterns(draw):
    """Draw a causal pattern: nested or not, with windows, block sparsity, or dense."""
    shown = draw(nested_branches() | st.lists(branches(), min_size=1, max_size=3))
    multiplicity = draw(st.sampled_from(["multiset", "set"]))
    ragged = "zero_keys" if multiplicity == "multiset" and draw(st.booleans()) else "exact"
    return pattern_of(
        [replace(b, causal=True, ragged="exact" if b.window or b.sparsity else ragged) for b in shown], multiplicity
    )


@st.composite
def texts(draw, batch):
    """Draw steps: of each the tokens of each row of a batch, and how often a document begins before it."""
    steps = []
    for _ in range(draw(st.integers(1, 12))):
        longest = draw(st.sampled_from([1, 1, 1, 2, 3, 3, 7, 20, 64]))
        is_equal = draw(st.booleans())
        counts = [longest if is_equal else draw(st.integers(0, longest)) for _ in range(batch)]
        steps.append((longest, counts))
    return steps


@st.composite
def cases(draw):
    kv_heads, batch = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    return {
        "pattern": draw(patterns()),
        "sizes": (batch, kv_heads * draw(st.integers(1, 3)), kv_heads, draw(st.integers(1, 5))),
        "steps": draw(texts(batch)),
        "breaks": draw(st.none() | st.lists(st.integers(0, 40), min_size=1, max_size=6)),
        "has_sinks": draw(st.booleans()),
        "by_branches": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


def config_of(pattern, heads, kv_heads, width, layers=1):
    return BlocksConfig(pattern, dim=heads * width, layers=layers, heads=heads, kv_heads=kv_heads)


@contextmanager
def paths(by_branches):
    """Compute steps of any length a branch at a time, in tiles of a few scores, or only long ones."""
    with pytest.MonkeyPatch.context() as patch:
        if by_branches:
            patch.setattr(layer, "BRANCH_TOKENS", 2)
            patch.setattr(branch_attention, "SCORES", 40)
            patch.setattr(branch_attention, "KEYS", 3)
        yield


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_steps_see_what_whole_texts_show(case):
    """Rows of unequal lengths, that begin documents where they like."""
    batch, heads, kv_heads, width = case["sizes"]
    generator = torch.Generator().manual_seed(case["seed"])
    totals = [sum(counts[b] for _, counts in case["steps"]) for b in range(batch)]
    size = max(max(totals), 1)
    q, k, v = (torch.randn(batch, size, n, width, generator=generator).double() for n in (heads, kv_heads, kv_heads))
    sinks = torch.randn(heads, generator=generator).double() if case["has_sinks"] else None
    documents = None
    if case["breaks"] is not None:
        starts = torch.tensor(case["breaks"])
        documents = (torch.arange(size)[None, :, None] >= starts * torch.arange(1, batch + 1)[:, None, None]).sum(-1)
    expected = [
        attend(
            *(x[b : b + 1, :n] for x in (q, k, v)),
            case["pattern"],
            documents=None if documents is None else documents[b : b + 1, :n],
            kernel="reference",
            sinks=sinks,
        )[0]
        for b, n in enumerate(totals)
    ]
    cache = DilatedCache(config_of(case["pattern"], heads, kv_heads, width), batch, dtype=torch.float64)
    at, result = [0] * batch, [[] for _ in range(batch)]
    for longest, counts in case["steps"]:
        places = (torch.tensor(at)[:, None] + torch.arange(longest)).clamp(max=size - 1)  # padding holds anything
        parts = [x[torch.arange(batch)[:, None], places] for x in (q, k, v)]
        ids = None if documents is None else documents[torch.arange(batch)[:, None], places]
        with cache.step(longest, counts=counts, documents=ids) as step, paths(case["by_branches"]):
            out = step.layer(0).attend(*parts, sinks=sinks)
        for b, count in enumerate(counts):
            result[b].append(out[b, :count])
            at[b] += count
        (most,) = cache.most_rows()
        assert most is None or max(max(cache.kept_rows(b)[0]) for b in range(batch)) <= most
    for b in range(batch):
        torch.testing.assert_close(torch.cat(result[b]), expected[b], rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    shown=nested_branches() | st.lists(branches(), min_size=1, max_size=3),
    kv_heads=st.integers(1, 4),
    t=st.integers(0, 70),
)
def test_the_rows_that_are_kept_are_those_that_some_later_query_sees(shown, kv_heads, t):
    pattern = pattern_of([replace(b, causal=True, sparsity=None) for b in shown], "multiset")
    # the queries of the next two segments see whatever a later query does
    tokens = torch.arange(t + 2 * max(b.segment_length or 1 for b in pattern.branches) + 20)
    expected = torch.zeros(kv_heads, dtype=torch.int64)
    for visible in pattern.visible(tokens, kv_heads):
        expected += visible[:, t:, :t].any(1).sum(1)
    cache = DilatedCache(config_of(pattern, kv_heads, kv_heads, 2), dtype=torch.float64)
    kv = torch.zeros(1, t, kv_heads, 2, dtype=torch.float64)
    if t:
        with cache.step(t) as step:
            step.layer(0).attend(kv, kv, kv)
    assert cache.kept_rows() == [expected.tolist()]
    (most,) = cache.most_rows()
    bound = [b.segment_length and -(-b.segment_length // b.dilation_rate) for b in pattern.branches]
    if all(bound):
        assert most <= sum(bound)
        assert cache.nbytes <= 2 * most * kv_heads * 2 * 8


def resident():
    """The bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.full
def test_a_million_tokens_take_the_memory_of_the_first_segments():
    """In blocks and single tokens, of drawn keys; the end is compared with attention from the last border on."""
    pattern = Pattern.dilated((64, 512, 4096, 128), (1, 4, 16, 3), is_causal=True)
    total, border, heads, width = 1_000_000, 999_424, 2, 4
    assert border % 4096 == 0
    cache = DilatedCache(config_of(pattern, heads, heads, width), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    end, result, sizes, first = [], [], set(), 0
    for start in range(0, total, 64):
        q, k, v = torch.randn(3, 1, 64, heads, width, generator=generator, dtype=torch.float64)
        outs = []
        sizes_of_steps = [1] * 64 if start >= border else [56, *[1] * 8]
        for part in zip(*(x.split(sizes_of_steps, 1) for x in (q, k, v)), strict=True):
            with cache.step(part[0].shape[1]) as step:
                outs.append(step.layer(0).attend(*part))
        if start >= border:
            end.append((q, k, v))
            result += outs
        if start >= 8192:
            sizes.add(cache.nbytes)
            first = first or resident()
    (size,) = sizes
    assert size <= 2 * cache.most_rows()[0] * heads * width * 8
    assert resident() - first < 32 * 2**20
    whole = [torch.cat(parts, 1) for parts in zip(*end, strict=True)]
    torch.testing.assert_close(torch.cat(result, 1), attend(*whole, pattern), rtol=0, atol=1e-9)
