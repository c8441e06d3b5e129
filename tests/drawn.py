"""Strategies of the property tests: patterns as the brute force and as the library write them, shapes and documents."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from brute import Shown
from hypothesis import strategies as st

from lightning_longnet import Branch, Pattern
from lightning_longnet.attention.kernels import eager, squares
from lightning_longnet.attention.kernels.sdpa import cpu
from lightning_longnet.attention.pattern.sparsity import Sparsity
from lightning_longnet.attention.plan import blocks as plan
from lightning_longnet.attention.plan import overlap, runs

positive = st.integers(1, 12)


@st.composite
def sparsities(draw):
    """Draw a sparsity as the brute force writes it; None half of the time."""
    if draw(st.booleans()):
        return None
    kind = draw(st.sampled_from(["local_window", "dilated_sparse", "global_local", "strided"]))
    some = draw(st.integers(1, 5)) if kind == "global_local" else draw(st.sampled_from([0, 0, 1, 4]))
    varies = kind in ("dilated_sparse", "strided") and draw(st.booleans())
    return kind, draw(st.integers(1, 4)), draw(st.sampled_from([0.05, 0.2, 0.35, 0.6, 1.0])), some, varies


@st.composite
def branches(draw):
    sparsity = draw(sparsities())
    return Shown(
        w=draw(st.none() | st.integers(1, 20)),
        r=draw(st.integers(1, 6)),
        window=None if sparsity else draw(st.none() | positive),
        causal=draw(st.booleans()),
        offsets=draw(st.sampled_from(["interleaved", "blocked"])),
        sparsity=sparsity,
    )


@st.composite
def nested_branches(draw):
    """Draw branches as LongNet uses them: each segment length and rate divides the next."""
    w, r, causal, nested = draw(st.integers(1, 5)), 1, draw(st.booleans()), []
    offsets = draw(st.sampled_from(["interleaved", "blocked"]))
    for _ in range(draw(st.integers(1, 3))):
        nested.append(Shown(w, r, None, causal, offsets))
        r *= draw(st.integers(1, 3))
        w *= r * draw(st.integers(1, 3))
    return nested


def pattern_of(shown, multiplicity):
    branches = (
        Branch(b.w, b.r, b.window, b.causal, b.offsets, None if b.sparsity is None else Sparsity(*b.sparsity), b.ragged)
        for b in shown
    )
    return Pattern(tuple(branches), multiplicity)


@st.composite
def document_ids(draw, length):
    """Draw None, or non-decreasing ids with some neighbours of equal length."""
    if draw(st.booleans()):
        return None
    ids, each = [], 0
    while len(ids) < length:
        size, times = draw(st.integers(1, 9)), draw(st.integers(1, 4))
        for _ in range(times):
            each += draw(st.integers(1, 3))
            ids += [each] * size
    return ids[:length]


@st.composite
def padding(draw, batch, length):
    """Draw None, or True where a token is hidden: at the ends of each row, as batches are padded, or anywhere."""
    where = draw(st.sampled_from([None, None, "right", "left", "anywhere"]))
    if where is None:
        return None
    if where == "anywhere":
        return [draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in range(batch)]
    counts = [draw(st.integers(0, length)) for _ in range(batch)]
    rows = [[False] * (length - n) + [True] * n for n in counts]
    return rows if where == "right" else [row[::-1] for row in rows]


@st.composite
def cases(draw):
    kv_heads, group = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    shown = draw(nested_branches() | st.lists(branches(), min_size=1, max_size=3))
    multiplicity = draw(st.sampled_from(["multiset", "set"]))
    if multiplicity == "multiset" and draw(st.booleans()):
        shown = [
            b if b.window or b.sparsity else replace(b, ragged=draw(st.sampled_from(["zero_keys", "exact"])))
            for b in shown
        ]
    ids = draw(document_ids(length))
    if ids is not None and batch > 1 and draw(st.booleans()):
        ids = [ids] + [draw(document_ids(length)) or [0] * length for _ in range(batch - 1)]  # each row its own
    return {
        "shape": (batch, length, kv_heads * group, kv_heads, draw(st.integers(1, 9))),
        "shown": shown,
        "multiplicity": multiplicity,
        "ids": ids,
        "hidden": draw(padding(batch, length)),
        "dropout": draw(st.sampled_from([0.0, 0.0, 0.0, 0.1, 0.6])),
        "mix": draw(st.sampled_from(["exact", "detached"])),
        "layout": draw(st.sampled_from(["contiguous", "heads first", "fused", "last dim strided"])),
        "planned": (draw(st.booleans()), draw(st.sampled_from([1024, 3])), draw(st.booleans())),
        "seed": draw(st.integers(0, 2**31)),
    }


@contextmanager
def planned(counts_once, tile, is_tiled=False):
    """Have plans compute pairs once wherever branches allow it (`counts_once`), or never; in tiles of this size.

    With `is_tiled` plain products compute every block on a CPU for which the kernel "sdpa" has them, in small tiles.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "WEIGHTS_PAY", 1e9 if counts_once else -1)
        patch.setattr(overlap, "REPEAT_TILE", tile)
        patch.setattr(runs, "BAND_ROWS", (1, tile))
        patch.setattr(runs, "BAND_SPLIT", 4 if counts_once else 512)
        patch.setattr(torch, "get_num_threads", lambda: 1)
        if is_tiled:
            patch.setattr(cpu, "LEAST_TILED", 0)
            patch.setattr(cpu, "TILED_ROWS", 0)
            patch.setattr(cpu, "LEAST_SQUARED", 0)
            patch.setattr(cpu, "_tiles_are_fast", lambda: True)
            patch.setattr(eager, "_ROWS", 2)
            patch.setitem(eager._TILE, "cpu", 8)
            patch.setattr(squares, "SIDE", 2)
            patch.setattr(squares, "MOST_SCORES", 8)
        for kept in (plan.plan, squares._tiles):
            kept.cache_clear()
        yield
    for kept in (plan.plan, squares._tiles):
        kept.cache_clear()


def tensors(shape, layout="contiguous", dtype=torch.float64, seed=0):
    """Return q, k, v as leaves, and a gradient, all in one memory layout."""
    batch, length, heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(seed)

    def drawn(count):
        if layout == "heads first":
            x = torch.randn(batch, count, length, dim, generator=generator, dtype=torch.float64).transpose(1, 2)
        elif layout == "fused":
            x = torch.randn(batch, length, count + 2, dim, generator=generator, dtype=torch.float64)[:, :, 1:-1]
        elif layout == "last dim strided":
            x = torch.randn(batch, length, count, 2 * dim, generator=generator, dtype=torch.float64)[..., ::2]
        else:
            x = torch.randn(batch, length, count, dim, generator=generator, dtype=torch.float64)
        return x.to(dtype)

    return [drawn(n).requires_grad_(i < 3) for i, n in enumerate((heads, kv_heads, kv_heads, heads))]
