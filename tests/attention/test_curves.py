"""Causal patterns along a curve, of any branches: what the definition shows, on one process and over ranks."""

from dataclasses import replace

import brute
import pytest
import torch
from brute import Shown
from tiers import tiered

from lightning_longnet import Pattern, SequenceShard, attend, sequence_hilbert_order
from lightning_longnet.attention.pattern.lines import lines_of

LENGTH, BATCH, HEADS, KV_HEADS, DIM = 45, 2, 4, 2, 6

# branches of a causal pattern, as the brute force and as the library know them
BRANCHES = {
    "longnet": [Shown(8, 1, None, True), Shown(32, 2, None, True)],
    "three, of lengths that divide nothing": [
        Shown(7, 2, None, True),
        Shown(20, 3, None, True, "blocked"),
        Shown(None, 4, None, True),
    ],
    "equal segments, several rates": [Shown(16, 1, None, True), Shown(16, 2, None, True), Shown(16, 4, None, True)],
    "one": [Shown(16, 2, None, True)],
    "a window": [Shown(None, 1, 6, True)],
    "a window, and segments": [Shown(None, 1, 6, True), Shown(8, 1, None, True), Shown(32, 2, None, True)],
    "windows in segments": [Shown(24, 1, 5, True), Shown(40, 2, 9, True), Shown(16, 2, None, True)],
    "not all causal": [Shown(8, 1, None, False), Shown(32, 2, None, True), Shown(None, 3, 7, False)],
}


def pattern_of(shown, multiplicity="multiset"):
    parts = []
    for each in shown:
        (branch,) = Pattern.dilated(
            (each.w or 1,), (each.r,), is_causal=each.causal, head_offsets=each.offsets
        ).branches
        parts.append(replace(branch, segment_length=each.w, window=each.window))
    return Pattern(tuple(parts), multiplicity)


def tables_of(shown, multiplicity="multiset", length=LENGTH):
    """The definition: what the pattern shows along the curve, without what comes later in the sequence if causal."""
    place = sequence_hilbert_order(length).argsort()
    ordered = sorted(shown, key=lambda b: (b.r, b.w or torch.inf, b.window or torch.inf))
    tables = []
    for each in ordered:
        (table,) = brute.counts([replace(each, causal=False)], "multiset", length, KV_HEADS)
        table = table[:, place][:, :, place]
        tables.append(table.tril() if each.causal else table)
    if multiplicity == "set":
        for i in range(len(tables) - 1, 0, -1):
            tables[i] = tables[i] * (sum(tables[:i]) == 0)
    return tables


def drawn(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    q, grad = torch.randn(2, BATCH, LENGTH, HEADS, DIM, dtype=torch.float64, generator=generator).to(dtype).unbind()
    k, v = torch.randn(2, BATCH, LENGTH, KV_HEADS, DIM, dtype=torch.float64, generator=generator).to(dtype).unbind()
    return q, k, v, grad


def hidden():
    return torch.arange(LENGTH) >= torch.tensor([[LENGTH], [37]])


def truth(shown, multiplicity, options):
    """Out, lse and gradients by brute force."""
    q, k, v, grad = drawn()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    tables = [tables_of(shown, multiplicity)] * BATCH
    if "key_padding_mask" in options:
        tables = [
            brute.padded(each, row.tolist()) for each, row in zip(tables, options["key_padding_mask"], strict=True)
        ]
    kept = None
    if "dropout" in options:
        many = len(shown)
        kept = brute.kept(options["dropout"], options["dropout_seed"], BATCH, HEADS, LENGTH, many, multiplicity)
        kept = [each * many if len(each) < many else each for each in kept]
    if "sinks" in options:
        leaves.append(options["sinks"].clone().requires_grad_())
        return out_with_sinks(*leaves, tables, grad)
    out, lse = brute.attention(*leaves, tables, DIM**-0.5, options.get("mix", "exact"), kept)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad)


def out_with_sinks(q, k, v, sinks, tables, grad):
    """The same with one more key, of value 0, which all queries see and whose score is the head's sink."""
    scale, pad = DIM**-0.5, torch.nn.functional.pad
    more_q = pad(torch.cat([q, sinks[:, None].expand(*q.shape[:3], 1)], 3), (0, 0, 0, 0, 0, 1))
    more_k = torch.cat([pad(k, (0, 1)), pad(torch.full_like(k[:, :1, :, :1], 1 / scale), (DIM, 0))], 1)
    more_v = pad(v, (0, 0, 0, 0, 0, 1))
    sink = torch.zeros(KV_HEADS, LENGTH + 1, LENGTH + 1, dtype=torch.float64)
    sink[..., -1] = 1
    more_tables = [[*(pad(table, (0, 1, 0, 1)) for table in each), sink] for each in tables]
    out, lse = (
        x.narrow(dim, 0, LENGTH)
        for x, dim in zip(brute.attention(more_q, more_k, more_v, more_tables, scale), (1, 2), strict=True)
    )
    return out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v, sinks), grad)


def ours(pattern, options, rows=slice(None), **more):
    q, k, v, grad = (x[:, rows] for x in drawn())
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = options["sinks"].clone().requires_grad_()
        leaves.append(options["sinks"])
    out, lse = attend(*leaves[:3], pattern, ordering="hilbert", return_lse=True, **options, **more)
    return out.detach(), lse, *torch.autograd.grad(out, leaves, grad)


OPTIONS = {
    "plain": {},
    "detached": {"mix": "detached"},
    "padding": {"key_padding_mask": hidden()},
    "dropout": {"dropout": 0.3, "dropout_seed": 11},
    "sinks": {"sinks": torch.linspace(-2, 1, HEADS, dtype=torch.float64)},
    "all": {
        "mix": "detached",
        "key_padding_mask": hidden(),
        "dropout": 0.3,
        "dropout_seed": 11,
    },
}


def assert_equal(found, expected, tolerance=1e-12):
    for ours, true in zip(found, expected, strict=True):
        finite = true.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        assert (ours - true)[finite].abs().max() <= tolerance * max(1, true[finite].abs().max())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", BRANCHES)
def test_equals_brute_force(name, options):
    shown = BRANCHES[name]
    assert_equal(ours(pattern_of(shown), OPTIONS[options]), truth(shown, "multiset", OPTIONS[options]))
