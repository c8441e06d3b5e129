"""Null keys: torchscale's padding of segments that are not full, in the softmax of their queries."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import brute
import drawn
import pytest
import torch
import yaml
from brute import Shown
from cells import held
from split import side_by_side, step, whole
from tiers import tiered

from lightning_longnet import (
    Branch,
    DilatedAttention,
    LongNetConfig,
    Pattern,
    SequenceShard,
    attend,
    sequence_hilbert_order,
)
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.spec import AttentionSpec

RECORDED = torch.load(Path(__file__).parents[1] / "data/torchscale_ragged.pt", weights_only=True)
DIM = 2
SHOWN = [Shown(4, ragged="zero_keys"), Shown(16, 2, ragged="zero_keys")]


def case_name(case):
    segments, rates, heads, causal, length = case
    words = (*(f"{w}/{r}" for w, r in zip(segments, rates, strict=True)), f"{heads} heads", f"{length} tokens")
    return " ".join(words) + " causal" * causal


def recorded():
    results = RECORDED["results"].split([4 * length * heads * DIM for *_, heads, _, length in RECORDED["cases"]])
    for case, flat in zip(RECORDED["cases"], results, strict=True):
        *_, heads, _, length = case
        yield pytest.param(*case, flat.view(4, 1, length, heads, DIM).unbind(), id=case_name(case))


def inputs(length, heads):
    """What `data/record_ragged.py` gave torchscale."""
    i = torch.arange(length * heads * DIM, dtype=torch.float64)
    rows = [1.5 * (0.7 * i + 0.1).sin(), 1.5 * (1.3 * i + 0.2).sin(), (0.9 * i + 0.3).sin(), (0.37 * i).cos()]
    return [x.view(1, length, heads, DIM) for x in rows]


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "reference"])
@pytest.mark.parametrize(("segments", "rates", "heads", "causal", "length", "truth"), list(recorded()))
def test_outputs_and_gradients_are_torchscales(segments, rates, heads, causal, length, truth, kernel):
    *leaves, grad = inputs(length, heads)
    leaves = [x.requires_grad_() for x in leaves]
    pattern = Pattern.dilated(segments, rates, causal, "blocked", ragged="zero_keys")
    out = attend(*leaves, pattern, mix="detached", kernel=kernel)
    for ours, theirs in zip((out, *torch.autograd.grad(out, leaves, grad)), truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_torchscale_displaces_segments_that_a_rate_does_not_divide():
    """It pads each segment of 5 to 6 places, and cuts the results apart every 6 tokens."""
    *tensors, _ = inputs(13, 2)
    ours = attend(*tensors, Pattern.dilated((5,), (2,), False, "blocked", ragged="zero_keys"))[0]
    theirs = RECORDED["displaced"]
    for segment in (0, 1):
        torch.testing.assert_close(ours[5 * segment :][:5], theirs[6 * segment :][:5], rtol=0, atol=1e-10)
    torch.testing.assert_close(ours[10], theirs[12], rtol=0, atol=1e-10)
    assert (ours[5:] - theirs[5:]).abs().max() > 0.1


def test_null_keys_fill_a_segment_up():
    pattern = Pattern.dilated((4, 8), (1, 3), ragged="zero_keys")
    near = [0] * 8 + [2, 2]
    # of 8 tokens the residues 0 and 1 have three and residue 2 has two, where the padded 9 have three of each
    whole = [[0] * 8, [0] * 8, [0, 0, 1, 0, 0, 1, 0, 0]]
    far = [[2, 0], [0, 2], [0, 0]]
    expected = torch.tensor([near] * 3) + torch.tensor([a + b for a, b in zip(whole, far, strict=True)])
    assert torch.equal(pattern.null_keys(10, heads=3), expected)
    assert torch.equal(pattern.null_keys(10, heads=6, kv_heads=3), expected.repeat_interleave(2, 0))
    # a segment is no longer than the sequence
    assert Pattern.dilated((1024,), (1,), ragged="zero_keys").null_keys(10, heads=1).eq(0).all()
    assert pattern.null_keys(0, heads=3).shape == (3, 0)
    assert pattern.has_null_keys
    for other in (Pattern.dilated((4, 8), (1, 3)), Pattern.dilated((4, 8), (1, 3), True, ragged="zero_keys")):
        assert not other.has_null_keys
        assert other.null_keys(10, heads=3).eq(0).all()


def test_a_causal_mask_hides_them():
    q, k, v, grad = drawn.tensors((1, 13, 4, 2, 4))
    results = []
    for ragged in ("zero_keys", "exact"):
        out = attend(q, k, v, Pattern.dilated((4, 8), (1, 3), True, ragged=ragged))
        results.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "reference"])
@pytest.mark.parametrize("mix", ["exact", "detached"])
def test_a_query_whose_keys_are_padding_sees_null_keys_alone(kernel, mix):
    q, k, v, grad = drawn.tensors((1, 10, 2, 2, 4))
    pattern = Pattern.dilated((4, 16), (1, 2), ragged="zero_keys")
    hidden = torch.arange(10)[None] >= 8  # the tail of segments of 4, beside two null keys
    near = Pattern(pattern.branches[:1])
    out, lse = attend(q, k, v, near, key_padding_mask=hidden, mix=mix, kernel=kernel, return_lse=True)
    assert (out[:, 8:] == 0).all()
    torch.testing.assert_close(lse[..., 8:], torch.full_like(lse[..., 8:], 2).log())
    assert torch.autograd.grad(out[:, 8:], q, grad[:, 8:])[0].eq(0).all()
    results = attend(q, k, v, pattern, key_padding_mask=hidden, mix=mix, kernel=kernel)
    tables = brute.padded(brute.counts(SHOWN, "multiset", 10, 2), hidden[0].tolist())
    truth = brute.attention(q, k, v, [tables], 0.5, mix)[0]
    torch.testing.assert_close(results, truth)
    gradients = (torch.autograd.grad(x, (q, k, v), grad) for x in (results, truth))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
def test_they_stand_beside_sinks_and_other_branches(kernel):
    """Sinks are 0, of the score of one more null key."""
    q, k, v, grad = drawn.tensors((2, 10, 4, 2, 4))
    pattern = Pattern.dilated((4, 16), (1, 2), ragged="zero_keys") + Pattern.window(3)
    sinks = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    out, lse = attend(q, k, v, pattern, sinks=sinks, kernel=kernel, return_lse=True)
    results = torch.autograd.grad(out, (q, k, v, sinks), grad)
    tables = brute.counts([*SHOWN, Shown(window=3)], "multiset", 10, 2)
    sink = torch.zeros(2, 10, 1, dtype=torch.float64)
    tables = [torch.cat((table, sink + (i == 0)), -1) for i, table in enumerate(tables)]
    true_out, true_lse = brute.attention(q, k, v, [tables] * 2, 0.5)
    torch.testing.assert_close((out, lse), (true_out, true_lse.detach()))
    true = torch.autograd.grad(true_out, (q, k, v), grad)
    torch.testing.assert_close(results[:3], true)
    slope = (grad * out).sum(-1).transpose(1, 2)
    torch.testing.assert_close(results[3], -(torch.exp(-lse) * slope).sum((0, 2)))


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
@pytest.mark.parametrize("mix", ["exact", "detached"])
def test_each_document_is_padded_as_if_it_were_alone(kernel, mix):
    lengths = [5, 1, 9, 6]
    q, k, v, grad = drawn.tensors((1, 21, 4, 2, 4))
    pattern = Pattern.dilated((4, 16), (1, 3), ragged="zero_keys")
    ids = torch.arange(4).repeat_interleave(torch.tensor(lengths))
    packed = attend(q, k, v, pattern, documents=ids, mix=mix, kernel=kernel)
    documents = zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)
    alone = torch.cat([attend(*each, pattern, mix=mix, kernel=kernel) for each in documents], 1)
    torch.testing.assert_close(packed, alone)
    torch.testing.assert_close(*(torch.autograd.grad(out, (q, k, v), grad) for out in (packed, alone)))


def test_they_follow_the_line_of_the_ordering():
    q, k, v, _ = drawn.tensors((1, 20, 2, 2, 4))
    pattern = Pattern.dilated((8,), (2,), ragged="zero_keys")
    order = sequence_hilbert_order(20)
    truth = attend(q[:, order], k[:, order], v[:, order], pattern)
    torch.testing.assert_close(attend(q, k, v, pattern, ordering="hilbert")[:, order], truth)


def test_half_types_and_compiled_calls():
    q, k, v, _ = (x.detach().bfloat16() for x in drawn.tensors((1, 21, 2, 2, 16)))
    pattern = Pattern.dilated((8, 16), (1, 2), ragged="zero_keys")
    truth = attend(q.double(), k.double(), v.double(), pattern)
    torch.testing.assert_close(attend(q, k, v, pattern).double(), truth, rtol=0.02, atol=0.02)
    compiled = torch.compile(lambda *x: attend(*x, pattern), fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), attend(q, k, v, pattern))


# Patterns as values


def test_it_is_written_and_shown():
    pattern = Pattern.dilated((4, 8), (1, 2), head_offsets="blocked", ragged="zero_keys")
    assert pattern != Pattern.dilated((4, 8), (1, 2), head_offsets="blocked")
    assert Pattern(**yaml.safe_load(yaml.safe_dump(pattern.to_dict()))) == pattern
    assert Pattern.loads(pattern.dumps()) == pattern
    assert AttentionSpec.loads(AttentionSpec(pattern, "sdpa").dumps()).pattern == pattern
    assert 'ragged="zero_keys"' in repr(pattern).replace("'", '"')
    layer = {"pattern": pattern.to_dict(), "dim": 8, "heads": 2, "layers": 1}
    assert LongNetConfig(**layer).pattern == pattern
    assert "4/1 blocked zero keys + 8/2 blocked zero keys" in repr(DilatedAttention(pattern))
    assert pattern.plot(6, heads=2).get_suptitle() == "(4, 1) zero keys + (8, 2) zero keys"
    # what was written before there was a choice
    values = pattern.to_dict()
    for branch in values["branches"]:
        del branch["ragged"]
    assert Pattern(**values) == Pattern.dilated((4, 8), (1, 2), head_offsets="blocked")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Branch(4, ragged="pad"), "ragged must be one of 'exact', 'zero_keys', got 'pad'"),
        (lambda: Branch(4, window=2, ragged="zero_keys"), "ragged must be 'exact' where there is a window .* window 2"),
        (
            lambda: Pattern.block_sparse("strided", 2, 0.5, within=Pattern.dilated((8,), (1,), ragged="zero_keys")),
            "ragged must be 'exact' where there is a window or a sparsity, got 'zero_keys' and sparsity 0.5 of strided",
        ),
        (
            lambda: Pattern.dilated((4,), (1,), multiplicity="set", ragged="zero_keys"),
            "multiplicity must be 'multiset' where a branch has ragged 'zero_keys', got 'set'",
        ),
    ],
)
def test_what_has_no_padding_refuses_it(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Over ranks

RANKED = Pattern.dilated((6, 12, 64), (1, 2, 4), ragged="zero_keys")


def split(group, tensors, placement, ids, settings):
    whole = step(group, tensors, placement, ids, None, settings, torch.float64)
    alike = {**settings, "pattern": Pattern(tuple(replace(b, ragged="exact") for b in settings["pattern"].branches))}
    return *whole, step(group, tensors, placement, ids, None, alike, torch.float64)[5:]


def compare_ranks(pool, lengths, exchange, mix, placement="contiguous", ordering="raster", ids=None):
    where = Placement(lengths, placement)
    tensors = [x.detach() for x in drawn.tensors((2, sum(lengths), 8, 4, 4))]
    pattern = RANKED if ordering == "raster" else Pattern(RANKED.branches[1:2])
    settings = {"pattern": pattern, "mix": mix, "exchange": exchange, "ordering": ordering}
    results = pool.run(len(lengths), split, tensors, where, ids, settings)
    one = {"mix": mix, "ordering": ordering, "documents": ids}
    truth = whole(tensors, pattern, where, **one)
    for ours, true in zip(side_by_side(results), truth, strict=True):
        torch.testing.assert_close(ours, true, rtol=0, atol=1e-11)
    _, lse = attend(*tensors[:3], pattern, return_lse=True, **one)
    for rank, (_, rank_lse, *_) in enumerate(results):
        torch.testing.assert_close(rank_lse, lse[..., held(where, rank)], rtol=0, atol=1e-11)
    # no byte and no message more than without them
    assert all(each[5:7] == each[7] for each in results)


QUICK = [("gather", "exact"), ("ring", "detached"), ("swap", "detached")]


@pytest.mark.parametrize(
    ("exchange", "mix"), tiered(product(("gather", "ring", "swap", "auto"), ("exact", "detached")), quick=QUICK)
)
def test_ranks_equal_one_process(pool, exchange, mix):
    compare_ranks(pool, (11, 8), exchange, mix)


OVER_RANKS = product(
    ["zigzag", "documents", "hilbert"],
    [(23,), (4, 9, 0, 10), (7, 1, 8, 7)],
    ["gather", "ring", "swap"],
    ["exact", "detached"],
)


@pytest.mark.parametrize(("kind", "lengths", "exchange", "mix"), tiered(OVER_RANKS, quick=[], covers=2))
def test_placements_documents_and_orderings_over_ranks(pool, lengths, exchange, mix, kind):
    ids = None
    if kind == "documents":
        ids = torch.tensor([0] * 9 + [1] * 2 + [2] * 12)[: sum(lengths)]
    placement = "zigzag" if kind == "zigzag" else "contiguous"
    ordering = "hilbert" if kind == "hilbert" else "raster"
    compare_ranks(pool, lengths, exchange, mix, placement, ordering, ids)


def test_documents_over_ranks_with_local_keys(pool):
    compare_ranks(pool, (9, 7), "local", "detached", ids=torch.tensor([0] * 5 + [1] * 4 + [2] * 7))


def test_places_over_ranks_are_those_of_the_line(pool):
    compare_ranks(pool, (9, 10), "gather", "exact", ordering="hilbert")


def with_another_padding_on_one_rank(group):
    x = torch.zeros(1, 4, 1, 2)
    pattern = Pattern.dilated((4,), (1,), ragged="exact" if group.rank() else "zero_keys")
    with pytest.raises(ValueError, match="pattern must be equal on all ranks of a shard"):
        attend(x, x, x, pattern, shard=SequenceShard(group, 4))


def test_another_padding_on_one_rank_is_an_error_on_all(pool):
    pool.run(2, with_another_padding_on_one_rank)
