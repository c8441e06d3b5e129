"""MultiheadDilatedAttention against nn.MultiheadAttention, against the brute force, and within torch's encoder."""

from dataclasses import replace

import brute
import drawn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import as_floats, causal_mask
from torch import nn

from lightning_longnet import MultiheadDilatedAttention, Pattern
from lightning_longnet.layers import attending
from lightning_longnet.layers.masks import ignored_keys, masked_causally

PATTERN = Pattern.dilated((4, 16), (1, 2))
IGNORED = pytest.mark.filterwarnings("ignore:.*nested.tensor:UserWarning")


@st.composite
def cases(draw):
    heads, batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 10))
    flags = st.booleans()
    widths = st.integers(1, 7)
    layout = draw(st.sampled_from(["batch first", "tokens first", "one sequence"]))
    batch = 1 if layout == "one sequence" else batch
    row = st.lists(flags, min_size=length - 1, max_size=length - 1)
    return {
        "shape": (batch, length),
        "layout": layout,
        "heads": heads,
        "embed_dim": heads * draw(st.integers(1, 4)),
        "widths": draw(st.just({}) | st.fixed_dictionaries({"kdim": widths, "vdim": widths})),
        "same": draw(flags),  # one tensor as query, key and value
        "bias": draw(flags),
        # torch gives NaN where a query sees no key; so the first is never hidden
        "hidden": draw(st.none() | st.lists(row.map(lambda x: [False, *x]), min_size=batch, max_size=batch)),
        "causal": draw(st.sampled_from([None, "hint", "mask", "hint and mask"])),
        "zeros": draw(flags),
        "floats": draw(flags),
        "shown": draw(st.lists(drawn.branches(), min_size=1, max_size=3)),
        "seed": draw(st.integers(0, 2**31)),
    }


def laid_out(x, layout):
    return {"batch first": x, "tokens first": x.transpose(0, 1), "one sequence": x[0]}[layout]


def prepared(case, dtype, **settings):
    """Ours and torch's with the same weights, their inputs in the drawn layout, and their masks."""
    (batch, length), embed_dim = case["shape"], case["embed_dim"]
    words = {"bias": case["bias"], "batch_first": case["layout"] == "batch first", "dtype": dtype}
    words |= {} if case["same"] else case["widths"]
    ours = MultiheadDilatedAttention(embed_dim, case["heads"], **words, **settings)
    theirs = nn.MultiheadAttention(embed_dim, case["heads"], **words)
    generator = torch.Generator().manual_seed(case["seed"])
    with torch.no_grad():
        for parameter in ours.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values / parameter.shape[-1] ** 0.5)
    theirs.load_state_dict(ours.state_dict())
    widths = [embed_dim] if case["same"] else [embed_dim, ours.kdim, ours.vdim]
    leaves = [
        laid_out(torch.randn(batch, length, width, generator=generator, dtype=torch.float64), case["layout"])
        .to(dtype)
        .requires_grad_()
        for width in widths
    ]
    inputs = leaves * 3 if case["same"] else leaves
    masks = {}
    if case["hidden"] is not None:
        hidden = torch.tensor(case["hidden"])
        hidden = hidden[0] if case["layout"] == "one sequence" else hidden
        masks["key_padding_mask"] = as_floats(hidden, dtype) if case["floats"] else hidden
    if case["causal"] in ("mask", "hint and mask"):
        masks["attn_mask"] = causal_mask(length, dtype if case["floats"] else torch.bool)
    elif case["causal"] is None and case["zeros"]:
        masks["attn_mask"] = torch.zeros(length, length, dtype=dtype if case["floats"] else torch.bool)
    if case["causal"] in ("hint", "hint and mask"):
        masks["is_causal"] = True
    return ours, theirs, leaves, inputs, masks


def assert_equal(result, truth, leaves, layers, tolerance):
    """Within the tolerance of the largest value, and gradients within ten times that."""
    grad = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(truth.dtype)
    ours, theirs = (
        torch.autograd.grad(out, leaves + list(layer.parameters()), grad)
        for out, layer in zip((result, truth), layers, strict=True)
    )
    bounds = [tolerance] + [10 * tolerance] * len(ours)
    for a, b, bound in zip((result, *ours), (truth, *theirs), bounds, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=bound * max(1, b.abs().max().item()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@settings(max_examples=80, deadline=None)
@given(case=cases())
def test_dense_equals_torchs(dtype, tolerance, case):
    ours, theirs, leaves, inputs, masks = prepared(case, dtype)
    result, weights = ours(*inputs, **masks)
    assert weights is None
    if "is_causal" in masks:
        masks["attn_mask"] = causal_mask(case["shape"][1], dtype if case["floats"] else torch.bool)
    truth, _ = theirs(*inputs, need_weights=False, **masks)
    assert result.shape == truth.shape
    assert_equal(result, truth, leaves, (ours, theirs), tolerance)


@settings(max_examples=80, deadline=None)
@given(case=cases(), sub_norm=st.booleans())
def test_patterns_equal_brute_force(case, sub_norm):
    """Causal here is every branch causal."""
    pattern = drawn.pattern_of(case["shown"], "multiset")
    layer, _, leaves, inputs, masks = prepared(case, torch.float64, pattern=pattern)
    if sub_norm:
        layer.sub_norm = nn.LayerNorm(case["embed_dim"], dtype=torch.float64)
        nn.init.normal_(layer.sub_norm.weight)
    shown = case["shown"]
    if case["causal"] is not None:
        shown = [replace(b, causal=True) for b in shown]
    (batch, length), heads, width = case["shape"], case["heads"], case["embed_dim"]
    tables = [brute.counts(shown, "multiset", length, heads)] * batch
    if case["hidden"] is not None:
        seen = ~torch.tensor(case["hidden"])
        tables = [[table * keys for table in each] for each, keys in zip(tables, seen, strict=True)]
    parts = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
    weights = parts if layer.in_proj_weight is None else layer.in_proj_weight.chunk(3)
    biases = [0, 0, 0] if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    batch_first = {
        "batch first": lambda x: x,
        "tokens first": lambda x: x.transpose(0, 1),
        "one sequence": lambda x: x[None],
    }
    q, k, v = (
        (batch_first[case["layout"]](x) @ weight.T + bias).unflatten(-1, (heads, -1))
        for x, weight, bias in zip(inputs, weights, biases, strict=True)
    )
    truth = brute.attention(q, k, v, tables, (width // heads) ** -0.5)[0].flatten(2)
    if sub_norm:
        centred = truth - truth.mean(-1, keepdim=True)
        truth = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * layer.sub_norm.weight
        truth = truth + layer.sub_norm.bias
    truth = truth @ layer.out_proj.weight.T + (0 if layer.out_proj.bias is None else layer.out_proj.bias)
    result = layer(*inputs, **masks)[0]
    assert_equal(result, laid_out(truth, case["layout"]), leaves, (layer, layer), 1e-7)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", [{}, {"kdim": 3}, {"vdim": 5}, {"kdim": 8, "vdim": 8}])
def test_begins_as_torchs_bit_by_bit_and_shares_its_state(widths, bias):
    torch.manual_seed(7)
    theirs = nn.MultiheadAttention(8, 2, bias=bias, **widths)
    torch.manual_seed(7)
    ours = MultiheadDilatedAttention(8, 2, bias=bias, **widths)
    following = torch.rand(1)
    torch.manual_seed(7)
    nn.MultiheadAttention(8, 2, bias=bias, **widths)
    assert torch.equal(following, torch.rand(1))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    other = nn.MultiheadAttention(8, 2, bias=bias, **widths)
    ours.load_state_dict(other.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), other.parameters(), strict=True))


def test_sub_norm_adds_its_own_state():
    extra = set(MultiheadDilatedAttention(8, 2, sub_norm=True).state_dict()) - set(
        MultiheadDilatedAttention(8, 2).state_dict()
    )
    assert extra == {"sub_norm.weight", "sub_norm.bias"}


def test_takes_torchs_words_in_torchs_order():
    arguments = (8, 2, 0.1, False, False, False, 3, 5, True, "cpu", torch.float64)
    theirs, ours = nn.MultiheadAttention(*arguments), MultiheadDilatedAttention(*arguments)
    for name in (
        "embed_dim",
        "num_heads",
        "dropout",
        "kdim",
        "vdim",
        "batch_first",
        "head_dim",
        "bias_k",
        "bias_v",
        "add_zero_attn",
        "in_proj_bias",
        "in_proj_weight",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    ours.load_state_dict(theirs.state_dict())
    assert not isinstance(ours, nn.MultiheadAttention)


def test_a_query_whose_keys_are_all_hidden_gets_the_bias_alone():
    layer = MultiheadDilatedAttention(8, 2, batch_first=True)
    nn.init.normal_(layer.out_proj.bias)
    x = torch.randn(2, 4, 8)
    hidden = torch.tensor([[True] * 4, [False] * 4])
    out, _ = layer(x, x, x, key_padding_mask=hidden)
    assert torch.equal(out[0], layer.out_proj.bias.expand(4, 8))
    assert out.isfinite().all()


def test_nothing_is_copied_for_a_layout_of_tokens_first(monkeypatch):
    seen = []
    monkeypatch.setattr(attending, "attend", lambda *qkv, **_: seen.extend(qkv[:3]) or qkv[0])
    x = torch.randn(5, 2, 8)
    out, _ = MultiheadDilatedAttention(8, 2)(x, x, x)
    assert out.shape == x.shape
    assert len({part.untyped_storage().data_ptr() for part in seen}) == 1
    assert all(part.shape == (2, 5, 2, 4) for part in seen)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_masks_break_no_graph():
    """Where values cannot be read, an assertion on the device stands for the ValueError."""

    def read(padding, mask):
        return ignored_keys(padding, (2, 6)), padding + masked_causally(mask, True, 6)

    compiled = torch.compile(read, backend="aot_eager", fullgraph=True)
    hidden, mask = torch.tensor([[False] * 6, [False] * 3 + [True] * 3]), causal_mask(6)
    padding = as_floats(hidden, torch.float32)
    assert torch.equal(compiled(padding, mask)[0], hidden)
    compiled(padding, torch.zeros_like(mask))
    with pytest.raises(RuntimeError, match="key_padding_mask must be boolean, or hold nothing but 0 and -inf"):
        compiled(padding + 1, mask)
    with pytest.raises(RuntimeError, match="attn_mask must be the causal mask, or hide nothing"):
        compiled(padding, mask.T)


def layer(*arguments, **settings):
    return MultiheadDilatedAttention(*(arguments or (8, 2)), batch_first=True, **settings)


def called(x=None, key=None, **words):
    x = torch.zeros(2, 6, 8) if x is None else x
    return layer()(x, x if key is None else key, x, **words)


def nested(**words):
    return torch.nested.as_nested_tensor([torch.zeros(3, 8), torch.zeros(2, 8)], **words)


ALMOST = causal_mask(6).clone()
ALMOST[0, 5] = False

REFUSALS = {
    "add_bias_kv": (lambda: layer(add_bias_kv=True), "add_bias_kv must be False, got True: a key of no token"),
    "add_zero_attn": (lambda: layer(add_zero_attn=True), "add_zero_attn must be False, got True"),
    "heads": (lambda: layer(10, 3), "embed_dim must be divisible by num_heads, got 10 and 3"),
    "no width": (lambda: layer(0, 1), "embed_dim must be a positive integer, got 0"),
    "kdim": (lambda: layer(kdim=0), "kdim must be a positive integer, got 0"),
    "dropout": (lambda: layer(dropout=-0.1), "dropout must be at least 0 and less than 1, got -0.1"),
    "gain": (lambda: layer(gain=float("nan")), "gain must be a positive, finite number, got nan"),
    "pattern": (lambda: layer(pattern=4), "pattern must be a Pattern, or the dictionary of Pattern.to_dict, got 4"),
    "weights": (lambda: called(need_weights=True), "need_weights must be False: the weights of N x N pairs"),
    "rank": (lambda: called(torch.zeros(8)), r"query must be \(tokens, width\) .*, got shape \(8,\)"),
    "width": (lambda: called(torch.zeros(2, 6, 9)), r"query must be 8 wide, got shape \(2, 6, 9\)"),
    "cross attention": (
        lambda: called(key=torch.zeros(2, 5, 8)),
        r"key must have the tokens and the batch of query, \(2, 6\), got \(2, 5\): a pattern is drawn on one line",
    ),
    "other batch": (lambda: called(key=torch.zeros(1, 6, 8)), r"key must have .* \(2, 6\), got \(1, 6\)"),
    "padding's shape": (
        lambda: called(key_padding_mask=torch.zeros(6, dtype=torch.bool)),
        r"key_padding_mask must have the shape \(2, 6\), got \(6,\)",
    ),
    "padding of one sequence": (
        lambda: called(torch.zeros(6, 8), key_padding_mask=torch.zeros(1, 6, dtype=torch.bool)),
        r"key_padding_mask must have the shape \(6,\), got \(1, 6\)",
    ),
    "padding of integers": (
        lambda: called(key_padding_mask=torch.zeros(2, 6, dtype=torch.long)),
        "key_padding_mask must be boolean, or floats of 0 and -inf, got torch.int64",
    ),
    "padding that weighs": (
        lambda: called(key_padding_mask=torch.full((2, 6), -1e9)),
        "key_padding_mask must be boolean, or hold nothing but 0 and -inf, got -1000000000.0",
    ),
    "mask of another kind": (
        lambda: called(attn_mask=~causal_mask(6)),
        "attn_mask must be the causal mask, or hide nothing, got another one: a Pattern says which keys a query sees",
    ),
    "almost causal": (lambda: called(attn_mask=ALMOST), "attn_mask must be the causal mask"),
    "almost causal, with the hint": (
        lambda: called(attn_mask=ALMOST, is_causal=True),
        "attn_mask must be the causal mask",
    ),
    "mask that weighs": (
        lambda: called(attn_mask=causal_mask(6, torch.float32) + 0.5),
        "attn_mask must be the causal mask",
    ),
    "large numbers for infinity": (
        lambda: called(attn_mask=causal_mask(6).float() * -1e9),
        "attn_mask must be the causal mask",
    ),
    "a mask for each sample": (
        lambda: called(attn_mask=torch.zeros(4, 6, 6)),
        r"attn_mask must be causal, boolean or floats, of shape \(6, 6\), got torch.float32 of shape \(4, 6, 6\)",
    ),
    "mask of integers": (
        lambda: called(attn_mask=causal_mask(6).long()),
        r"attn_mask must be causal, boolean or floats, of shape \(6, 6\), got torch.int64",
    ),
    "nested and padded": (
        lambda: called(nested(), key_padding_mask=torch.zeros(2, 3, dtype=torch.bool)),
        "key_padding_mask and attn_mask must be None beside nested tensors",
    ),
    "nested and jagged": (lambda: called(nested(layout=torch.jagged)), "strided, got the layout torch.jagged"),
    "nested and other keys": (lambda: called(nested(), nested()), "a nested query must be key and value as well"),
}


@IGNORED
@pytest.mark.parametrize(("call", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
