"""Causal patterns along a curve, of any branches: what the definition shows, on one process and over ranks."""

from dataclasses import replace
from itertools import product

import brute
import pytest
import torch
from brute import Shown
from tiers import tiered

from lightning_longnet import Pattern, SequenceShard, attend, sequence_hilbert_order

LENGTH, BATCH, HEADS, KV_HEADS, DIM = 45, 2, 8, 4, 5

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


def assert_equal(result, expected, tolerance=1e-12):
    for ours, true in zip(result, expected, strict=True):
        finite = true.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        torch.testing.assert_close(ours[finite], true[finite], rtol=tolerance, atol=tolerance)


QUICK = [
    *(("longnet", options) for options in OPTIONS),
    *((name, "all") for name in BRANCHES),
    ("a window, and segments", "plain"),
]


@pytest.mark.parametrize(("name", "options"), tiered(product(BRANCHES, OPTIONS), dict.fromkeys(QUICK)))
def test_equals_brute_force(name, options):
    shown = BRANCHES[name]
    assert_equal(ours(pattern_of(shown), OPTIONS[options]), truth(shown, "multiset", OPTIONS[options]))


SETS = ["longnet", "three, of lengths that divide nothing", "a window, and segments"]


@pytest.mark.parametrize(("name", "options"), tiered(product(SETS, OPTIONS), [("longnet", "all"), (SETS[1], "plain")]))
def test_a_set_counts_a_key_once(name, options):
    shown = BRANCHES[name]
    assert_equal(ours(pattern_of(shown, "set"), OPTIONS[options]), truth(shown, "set", OPTIONS[options]))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_each_kernel_computes_the_same(kernel):
    shown = BRANCHES["longnet"]
    assert_equal(ours(pattern_of(shown), {}, kernel=kernel), truth(shown, "multiset", {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_round_once(dtype):
    """Results of lines are merged, and their gradients added, before they are rounded."""
    shown = BRANCHES["three, of lengths that divide nothing"]
    q, k, v, grad = drawn(dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, pattern_of(shown), ordering="hilbert")
    wide = [x.detach().double().requires_grad_() for x in leaves]
    true, _ = brute.attention(*wide, [tables_of(shown)] * BATCH, DIM**-0.5)
    expected = true, *torch.autograd.grad(true, wide, grad.double())
    for ours, exact in zip((out, *torch.autograd.grad(out, leaves, grad)), expected, strict=True):
        assert (ours.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def line_of(branch, length):
    """The curve, with the tokens of each segment and residue in ascending order, as places of tokens."""
    curve = sequence_hilbert_order(length).tolist()
    w, line = branch.w or length, [None] * length
    for begin in range(0, length, w):
        for residue in range(branch.r):
            places = range(begin + residue, min(begin + w, length), branch.r)
            for place, token in zip(places, sorted(curve[p] for p in places), strict=True):
                line[place] = token
    return torch.tensor(line).argsort()


def test_kept_blocks_are_counted_on_the_line_of_their_branch():
    sparsity = ("local_window", 3, 0.4, 0, False)
    shown = [Shown(w, r, None, True, sparsity=sparsity) for w, r in ((16, 1), (32, 2))]
    within = Pattern.dilated((16, 32), (1, 2), is_causal=True)
    pattern = Pattern.block_sparse("local_window", 3, 0.4, within=within)
    tables = []
    for each in shown:
        (table,) = brute.counts([each], "multiset", LENGTH, KV_HEADS)
        place = line_of(each, LENGTH)
        tables.append(table[:, place][:, :, place])
        assert torch.equal(tables[-1], tables[-1].tril())
    q, k, v, grad = drawn()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = brute.attention(*leaves, [tables] * BATCH, DIM**-0.5)
    expected = out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad)
    assert_equal(ours(pattern, {}), expected)


@pytest.mark.parametrize("length", [1, 2, 3, 10])
def test_short_sequences(length):
    """Segments may be longer than the sequence, and a residue may have no token."""
    shown = [Shown(8, 3, None, True), Shown(None, 4, None, True), Shown(4, 1, None, True), Shown(None, 1, 2, True)]
    q, k, v, _ = (x[:, :length] for x in drawn())
    out = attend(q, k, v, pattern_of(shown), ordering="hilbert")
    tables = tables_of(shown, length=length)
    torch.testing.assert_close(out, brute.attention(q, k, v, [tables] * BATCH, DIM**-0.5)[0], rtol=1e-12, atol=1e-12)


def test_what_cannot_be_drawn_along_a_curve_is_refused():
    q, k, v, _ = drawn()
    mixed = pattern_of(BRANCHES["not all causal"], "set")
    within = replace(pattern_of(BRANCHES["longnet"]), multiplicity="set")
    for pattern, kernel, message in (
        (mixed, "auto", "pattern must be causal in all of its branches or in none where .* multiplicity 'set'"),
        (
            Pattern.block_sparse("strided", 4, 0.5, within=within),
            "auto",
            "pattern must keep all blocks of its 2 causal branches .* multiplicity 'set'",
        ),
        (
            pattern_of(BRANCHES["longnet"]),
            "reference",
            r"kernel must be 'auto' or 'eager', .* where ordering is 'hilbert', got 'reference', which",
        ),
        (within, "sdpa", "kernel='sdpa' cannot serve this call: cannot mask keys by their tokens. Those .* 'eager'"),
        (pattern_of(BRANCHES["a window"]), "sdpa", "cannot mask keys by their tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, pattern, ordering="hilbert", kernel=kernel)


DOCUMENTS = torch.stack([torch.arange(LENGTH) // 19, torch.tensor([0] * 8 + [1] * 30 + [2] * 7)])


@pytest.mark.parametrize(
    ("name", "options"),
    tiered(
        product(BRANCHES, OPTIONS),
        [("longnet", "all"), ("not all causal", "sinks"), ("a window, and segments", "plain")],
    ),
)
def test_each_document_has_a_curve_of_its_own(name, options):
    """A packed row equals each of its documents alone."""
    pattern, given = pattern_of(BRANCHES[name]), {**OPTIONS[options]}
    if "dropout" in given:  # its pairs are numbered by tokens of the whole row
        del given["dropout"], given["dropout_seed"]
    out, lse, *gradients = ours(pattern, given, documents=DOCUMENTS)
    sinks = 0.0
    for row in range(BATCH):
        for document in range(int(DOCUMENTS[row].max()) + 1):
            tokens = DOCUMENTS[row] == document
            q, k, v, grad = (x[row : row + 1, tokens] for x in drawn())
            own = {name: x[row : row + 1, tokens] if name == "key_padding_mask" else x for name, x in given.items()}
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            if "sinks" in own:
                own["sinks"] = own["sinks"].clone().requires_grad_()
                leaves.append(own["sinks"])
            alone, alone_lse = attend(*leaves[:3], pattern, ordering="hilbert", return_lse=True, **own)
            result = (out[row, tokens], lse[row][:, tokens], *(x[row, tokens] for x in gradients[:3]))
            grads = torch.autograd.grad(alone, leaves, grad)
            assert_equal(result, (alone[0], alone_lse[0], *(x[0] for x in grads[:3])))
            sinks = sinks + (grads[3] if len(grads) > 3 else 0.0)
    if len(gradients) > 3:
        assert_equal(gradients[3:], (sinks,))


# Over ranks

LENGTHS = {
    1: (45,),
    2: (30, 15),
    3: (16, 0, 29),
    4: (11, 12, 10, 12),
}


def step(group, case, exchange, placement, options):
    """One rank's tokens, out, lse and gradients."""
    name, multiplicity = case
    options = dict(options)
    length = LENGTHS[group.size()][group.rank()]
    bare = SequenceShard(group, length, placement)
    rows = bare.tokens()
    padding, documents = options.pop("key_padding_mask", None), options.pop("documents", None)
    shard = SequenceShard(
        group,
        length,
        placement,
        documents=None if documents is None else documents[:, rows],
        key_padding_mask=None if padding is None else padding[:, rows],
    )
    pattern = pattern_of(BRANCHES[name], multiplicity)
    return rows, ours(pattern, options, rows, shard=shard, exchange=exchange)


def traffic(group, lengths):
    """Messages and bytes that a rank sends in a forward and backward."""
    shard = SequenceShard(group, 32)
    leaves = [torch.randn(1, 32, 4, 8, requires_grad=True) for _ in range(3)]
    pattern = Pattern.dilated(lengths, (1,) * len(lengths), is_causal=True)
    attend(*leaves, pattern, shard=shard, ordering="hilbert", exchange="gather").sum().backward()
    return shard.comm.messages, shard.comm.sent_bytes


def test_a_line_whose_segments_are_on_one_rank_sends_nothing(pool):
    one, many, wide = (pool.run(2, traffic, lengths) for lengths in ((8,), (8, 16, 32), (8, 64)))
    assert many == one
    assert all(sent > fewer for (_, sent), (_, fewer) in zip(wide, one, strict=True))


CASES = ["longnet", "three, of lengths that divide nothing", "a window, and segments", "not all causal"]
OVER_RANKS = [
    (name, multiplicity, world, exchange, placement)
    for name, multiplicity in [*((name, "multiset") for name in CASES), ("longnet", "set")]
    for world in LENGTHS
    for exchange in ("gather", "ring", "swap", "auto")
    for placement in ("contiguous", "zigzag")
    if exchange != "swap" or world != 3
]
QUICK_OVER_RANKS = [
    ("longnet", "multiset", 4, "ring", "zigzag"),
    ("longnet", "set", 3, "gather", "contiguous"),
    ("a window, and segments", "multiset", 2, "swap", "zigzag"),
    ("not all causal", "multiset", 2, "ring", "contiguous"),
]


@pytest.mark.parametrize(
    ("name", "multiplicity", "world", "exchange", "placement"), tiered(OVER_RANKS, QUICK_OVER_RANKS, covers=2)
)
def test_equals_brute_force_over_ranks(pool, name, multiplicity, world, exchange, placement):
    for options in (OPTIONS["all"], OPTIONS["sinks"]):
        out, lse, *gradients = truth(BRANCHES[name], multiplicity, options)
        summed = 0
        for rows, result in pool.run(world, step, (name, multiplicity), exchange, placement, options):
            assert_equal(result[:5], [out[:, rows], lse[..., rows], *(x[:, rows] for x in gradients[:3])])
            summed = summed + sum(result[5:])
        assert_equal([summed][: len(gradients) - 3], gradients[3:])


@pytest.mark.parametrize(
    ("name", "multiplicity", "world", "exchange", "placement"), tiered(OVER_RANKS, QUICK_OVER_RANKS[:1], covers=1)
)
def test_documents_over_ranks_equal_one_process(pool, name, multiplicity, world, exchange, placement):
    for options in (OPTIONS["all"], OPTIONS["sinks"]):
        packed = {**options, "documents": DOCUMENTS}
        out, lse, *gradients = ours(pattern_of(BRANCHES[name], multiplicity), packed)
        summed = 0
        for rows, result in pool.run(world, step, (name, multiplicity), exchange, placement, packed):
            assert_equal(result[:5], [out[:, rows], lse[..., rows], *(x[:, rows] for x in gradients[:3])])
            summed = summed + sum(result[5:])
        assert_equal([summed][: len(gradients) - 3], gradients[3:])


def test_null_keys_are_merged_on_the_line_of_their_branches():
    """A branch with null keys on one line, and causal branches on others, are the merge of both alone."""
    padded = Pattern.dilated((8, 16), (2, 3), ragged="zero_keys")
    causal = Pattern.dilated((8, 32), (1, 2), is_causal=True)
    q, k, v = torch.randn(3, BATCH, LENGTH, HEADS, DIM, dtype=torch.float64).unbind()
    options = {"ordering": "hilbert", "return_lse": True}
    out, lse = attend(q, k, v, padded + causal, **options)
    parts = [attend(q, k, v, each, **options) for each in (padded, causal)]
    lses = torch.stack([each for _, each in parts])
    shares = (lses - lses.logsumexp(0)).exp().transpose(2, 3).unsqueeze(-1)
    torch.testing.assert_close(lse, lses.logsumexp(0))
    torch.testing.assert_close(out, sum(share * each for share, (each, _) in zip(shares, parts, strict=True)))
