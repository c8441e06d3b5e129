"""DilatedSelfAttention against a dense restatement from its parameters."""

import brute
import drawn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_longnet import DilatedSelfAttention, Pattern
from lightning_longnet.layers import attending, self_attention

CAUSAL = Pattern.dilated((4, 16), (1, 2), is_causal=True)


@st.composite
def cases(draw):
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, 12))
    rotary = draw(st.sampled_from(["rope", "xpos", None]))
    flags = st.booleans()
    ids = draw(document_rows(batch, length))
    return {
        "shown": draw(drawn.nested_branches() | st.lists(drawn.branches(), min_size=1, max_size=3)),
        "multiplicity": draw(st.sampled_from(["multiset", "set"])),
        "embed_dim": draw(st.integers(1, 8)),
        "heads": (kv_heads * group, kv_heads),
        "settings": {
            "head_dim": 2 * draw(st.integers(1, 3)),
            "bias": draw(flags),
            "rotary": rotary,
            "rope_base": draw(st.sampled_from([50.0, 10000.0])),
            "xpos_scale_base": draw(st.sampled_from([20.0, 512.0])),
            "qk_norm": draw(flags),
            "sub_norm": draw(flags),
            "mix": draw(st.sampled_from(["exact", "detached"])),
        },
        "shape": (batch, length),
        "ids": ids,
        "hidden": draw(
            st.none() | st.lists(st.lists(flags, min_size=length, max_size=length), min_size=batch, max_size=batch)
        ),
        "offset": draw(st.sampled_from([None, 0, 5])) if rotary else None,
        "seed": draw(st.integers(0, 2**31)),
    }


@st.composite
def document_rows(draw, batch, length):
    ids = draw(drawn.document_ids(length))
    if ids is None or draw(st.booleans()):
        return ids
    return [ids] + [draw(drawn.document_ids(length)) or [0] * length for _ in range(batch - 1)]


def with_drawn_parameters(layer, seed):
    """Biases and norms are drawn as well: at 0 and 1 they would hide what is not applied."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def normed(x, weight, bias=None):
    if bias is None:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def turned(x, places, kind, base, scale_base, power):
    """The rotation as a product of complex numbers; places (B, N)."""
    if kind is None:
        return x
    pairs = torch.arange(0, x.shape[-1], 2, dtype=torch.float64) / x.shape[-1]
    places = places.double()[:, :, None, None]
    decay = ((pairs + 0.4) / 1.4) ** (power * places / scale_base) if kind == "xpos" else 1
    z = torch.complex(x[..., ::2], x[..., 1::2]) * torch.exp(1j * places * base**-pairs) * decay
    return torch.view_as_real(z).flatten(-2)


def restated(layer, x, tables, places, rotary, rope_base, xpos_scale_base, mix):
    fused = x @ layer.qkv_proj.weight.T
    if layer.qkv_proj.bias is not None:
        fused = fused + layer.qkv_proj.bias
    heads = fused.view(*x.shape[:2], -1, layer.head_dim)
    q, k, v = heads.split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], 2)
    if layer.q_norm is not None:
        q, k = normed(q, layer.q_norm.weight), normed(k, layer.k_norm.weight)
    q = turned(q, places, rotary, rope_base, xpos_scale_base, 1)
    k = turned(k, places, rotary, rope_base, xpos_scale_base, -1)
    out = brute.attention(q, k, v, tables, layer.head_dim**-0.5, mix)[0].flatten(2)
    if layer.sub_norm is not None:
        out = normed(out, layer.sub_norm.weight, layer.sub_norm.bias)
    out = out @ layer.out_proj.weight.T
    return out if layer.out_proj.bias is None else out + layer.out_proj.bias


def tables_of(case, kv_heads):
    """What each sample's queries see, padding hidden; and each token's place in its document."""
    (batch, length), ids = case["shape"], case["ids"]
    rows = ids if ids and isinstance(ids[0], list) else [ids] * batch
    tables = [brute.counts(case["shown"], case["multiplicity"], length, kv_heads, row) for row in rows]
    if case["hidden"] is not None:
        seen = ~torch.tensor(case["hidden"])
        tables = [[table * keys for table in each] for each, keys in zip(tables, seen, strict=True)]
    places = [[i - row.index(row[i]) if row else i for i in range(length)] for row in rows]
    return tables, torch.tensor(places)


@settings(max_examples=120, deadline=None)
@given(case=cases())
def test_equals_the_restatement_gradients_included(case):
    pattern = drawn.pattern_of(case["shown"], case["multiplicity"])
    heads, kv_heads = case["heads"]
    layer = DilatedSelfAttention(
        case["embed_dim"], heads, pattern, num_kv_heads=kv_heads, dtype=torch.float64, **case["settings"]
    )
    with_drawn_parameters(layer, case["seed"])
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    x, grad = torch.randn(2, *case["shape"], case["embed_dim"], generator=generator, dtype=torch.float64).unbind()
    x.requires_grad_()
    tables, places = tables_of(case, kv_heads)
    out = layer(
        x,
        positions=None if case["offset"] is None else places + case["offset"],
        documents=None if case["ids"] is None else torch.tensor(case["ids"]),
        key_padding_mask=None if case["hidden"] is None else torch.tensor(case["hidden"]),
    )
    words = {name: case["settings"][name] for name in ("rotary", "rope_base", "xpos_scale_base", "mix")}
    truth = restated(layer, x, tables, places, **words)
    leaves = [x, *layer.parameters()]
    result, true = (torch.autograd.grad(y, leaves, grad, retain_graph=True) for y in (out, truth))
    torch.testing.assert_close(out, truth, rtol=1e-8, atol=1e-8)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    for name, ours, theirs in zip(names, result, true, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def test_the_attentions_dropout_is_given_to_attend(monkeypatch):
    seen = []
    monkeypatch.setattr(attending, "attend", lambda q, *_, **words: seen.append(words["dropout"]) or q)
    layer = DilatedSelfAttention(8, 2, CAUSAL, dropout=0.25)
    layer(torch.randn(1, 4, 8))
    layer.eval()(torch.randn(1, 4, 8))
    assert seen == [0.25, 0.0]


@pytest.mark.parametrize("num_kv_heads", [1, 8])
@pytest.mark.parametrize("rotary", ["rope", None])
def test_what_is_kept_for_the_backward(rotary, num_kv_heads):
    """The input, q, k, v and out once each, and little else; no q and k from before the rotation."""
    layer = DilatedSelfAttention(128, 8, CAUSAL, num_kv_heads=num_kv_heads, rotary=rotary)
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    x, kept = torch.randn(1, 100, 128), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(x)
    sizes = [t.untyped_storage().nbytes() for place, t in kept.items() if place not in parameters]
    expected = x.nbytes * (3 + 2 * num_kv_heads / 8)
    assert expected <= sum(sizes) < expected + 0.6 * x.nbytes
    del out


def test_a_query_without_keys_gets_the_bias_alone():
    layer = DilatedSelfAttention(8, 2, CAUSAL, bias=True)
    torch.nn.init.normal_(layer.out_proj.bias)
    out = layer(torch.randn(1, 4, 8), key_padding_mask=torch.tensor([[True, True, False, False]]))
    assert torch.equal(out[0, :2], layer.out_proj.bias.expand(2, 8))


def test_the_pattern_may_be_its_dictionary():
    x = torch.randn(1, 9, 8)
    layer = DilatedSelfAttention(8, 2, CAUSAL.to_dict())
    assert layer.pattern == CAUSAL
    assert layer(x).shape == x.shape


@pytest.mark.parametrize("qk_norm", [False, True])
def test_xpos_begins_anew_with_each_document(qk_norm):
    """Seven tokens are no multiple of a segment: its middle must be that of the document's own."""
    layer = DilatedSelfAttention(8, 2, Pattern.dilated((4,), (1,)), rotary="xpos", xpos_scale_base=5.0, qk_norm=qk_norm)
    x = torch.randn(1, 7, 8)
    row, documents = x.repeat(1, 3, 1), torch.arange(21) // 7
    packed = layer(row, documents=documents)
    torch.testing.assert_close(packed, layer(x).repeat(1, 3, 1))
    places = torch.arange(7).repeat(3) + 9
    torch.testing.assert_close(layer(row, positions=places, documents=documents), packed)


def layer(*arguments, **settings):
    return DilatedSelfAttention(*(arguments or (8, 2, CAUSAL)), **settings)


def x(*shape):
    return torch.zeros(shape or (1, 6, 8))


REFUSALS = {
    "pattern": (lambda: layer(8, 2, (2048, 1)), r"pattern must be a Pattern, or the dictionary .*, got \(2048, 1\)"),
    "another dictionary": (lambda: layer(8, 2, {"w": 4}), r"pattern must be .*, got \{'w': 4\}"),
    "embed_dim": (lambda: layer(0, 2, CAUSAL), "embed_dim must be a positive integer, got 0"),
    "heads": (lambda: layer(9, 2, CAUSAL), "embed_dim must be divisible by num_heads .*, got 9 and 2"),
    "no heads": (lambda: layer(8, -1, CAUSAL), "num_heads must be a positive integer, got -1"),
    "kv heads": (lambda: layer(num_kv_heads=3), "heads must be a multiple of kv_heads, both at least 1, got 2 and 3"),
    "head_dim": (lambda: layer(head_dim=2.5), "head_dim must be a positive integer, got 2.5"),
    "odd head_dim": (lambda: layer(head_dim=3), "head_dim must be even, as pairs are turned, got 3"),
    "rotary": (lambda: layer(rotary="alibi"), "kind must be one of 'rope', 'xpos', got 'alibi'"),
    "dropout": (lambda: layer(dropout=1.0), "dropout must be at least 0 and less than 1, got 1.0"),
    "gain": (lambda: layer(gain=0), "gain must be a positive, finite number, got 0"),
    "rank": (lambda: layer()(x(6, 8)), r"x must be \(batch, tokens, 8\), got shape \(6, 8\)"),
    "width": (lambda: layer()(x(1, 6, 9)), r"x must be \(batch, tokens, 8\), got shape \(1, 6, 9\)"),
    "positions of nothing": (
        lambda: layer(rotary=None)(x(), positions=torch.arange(6)),
        "positions must be None where rotary is None",
    ),
    "shape of positions": (
        lambda: layer()(x(), positions=torch.arange(5)),
        r"positions must be \(tokens,\) or \(batch, tokens\), \(6,\) or \(1, 6\), got \(5,\)",
    ),
    "shape of documents": (
        lambda: layer()(x(), documents=torch.arange(5)),
        r"documents must be \(tokens,\) or \(batch, tokens\), \(6,\) or \(1, 6\), got \(5,\)",
    ),
    "mix": (lambda: layer(mix="averaged")(x()), "mix must be one of 'exact', 'detached', got 'averaged'"),
}


@pytest.mark.parametrize(("call", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_shows_what_it_is():
    text = repr(layer(8, 2, CAUSAL + Pattern.window(3)))
    assert "8, 2, 4/1 causal + 16/2 causal + all/1 window 3, num_kv_heads=2, head_dim=4" in text


@pytest.mark.parametrize("rotary", ["rope", "xpos"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rotations_in_place_without_gradients_change_nothing(monkeypatch, rotary, qk_norm, dtype):
    monkeypatch.setattr(self_attention, "ROTATED_TOKENS", 7)
    torch.manual_seed(0)
    layer = DilatedSelfAttention(24, 4, CAUSAL, num_kv_heads=2, head_dim=6, rotary=rotary, qk_norm=qk_norm, dtype=dtype)
    x = torch.randn(2, 45, 24, dtype=dtype)
    documents = torch.tensor([[0] * 20 + [1] * 25, [0] * 3 + [1] * 42])
    places = torch.stack([torch.cat([torch.arange((row == i).sum()) for i in (0, 1)]) for row in documents])
    for options in ({}, {"documents": documents}, {"documents": documents, "positions": places}):
        expected = layer(x, **options)
        with torch.no_grad():
            torch.testing.assert_close(layer(x, **options), expected.detach(), rtol=0, atol=0)


def test_hooks_keep_what_they_saw_of_long_sequences(monkeypatch):
    monkeypatch.setattr(self_attention, "ROTATED_TOKENS", 7)
    layer, seen = DilatedSelfAttention(16, 2, CAUSAL), []
    layer.qkv_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(1, 20, 16)
    with torch.no_grad():
        layer(x)
        assert seen[0].equal(torch.nn.functional.linear(x, layer.qkv_proj.weight))
