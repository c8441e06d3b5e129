"""RotaryPositions against its definition: complex numbers of modulus zeta^p, in float64."""

import cmath
from collections import Counter

import drawn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import tiered
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_longnet import Pattern, RotaryPositions
from lightning_longnet.layers import positions
from lightning_longnet.layers.positions import document_index

XPOS = Pattern.dilated((16, 32), (1, 2), is_causal=True)


def score(q, k, i, j, base=10000.0, scale_base=None):
    """The real part of `q conj(k) e^(i theta (i - j))`, pair by pair, times xPos's decay: a function of i - j."""
    total, dim = 0.0, len(q)
    for pair in range(dim // 2):
        a, b = (complex(x[2 * pair], x[2 * pair + 1]) for x in (q.tolist(), k.tolist()))
        turn = cmath.exp(1j * (i - j) * base ** (-2 * pair / dim))
        decay = 1 if scale_base is None else ((2 * pair / dim + 0.4) / 1.4) ** ((i - j) / scale_base)
        total += (a * b.conjugate() * turn).real * decay
    return total


def tensors(length, dim, dtype=torch.float64, batch=1, heads=1):
    generator = torch.Generator().manual_seed(length)
    return torch.randn(2, batch, length, heads, dim, generator=generator, dtype=torch.float64).to(dtype).unbind()


def scores(q, k):
    return torch.einsum("bihd,bjhd->bhij", q.double(), k.double())


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    dim=st.integers(1, 4).map(lambda x: 2 * x),
    places=st.lists(st.integers(0, 10**7), min_size=1, max_size=6),
    scale_base=st.none() | st.floats(20, 600),
)
def test_scores_are_those_of_the_distance(lengths, dim, places, scale_base):
    pattern = Pattern.dilated(lengths, [1] * len(lengths))
    kind = "rope" if scale_base is None else "xpos"
    rotary = RotaryPositions(dim, base=500.0, kind=kind, scale_base=scale_base or 1, pattern=pattern)
    q, k = tensors(len(places), dim)
    result = scores(*rotary(q, k, torch.tensor(places)))[0, 0]
    for a, i in enumerate(places):
        for b, j in enumerate(places):
            if kind == "rope" or any(i // w == j // w for w in lengths):
                truth = score(q[0, a, 0], k[0, b, 0], i, j, 500.0, scale_base)
                assert abs(result[a, b] - truth) <= 1e-6 * (1 + abs(truth))


def test_pairs_are_neighbours():
    rotary = RotaryPositions(4)
    q = torch.eye(4, dtype=torch.float64)[None, :, None]
    turned, _ = rotary(q, q, torch.full((4,), 3))
    first, second = (torch.tensor(3 * angle, dtype=torch.float64) for angle in (1.0, 0.01))
    truth = torch.zeros(4, 4, dtype=torch.float64)
    truth[:2, :2] = torch.stack((first.cos(), first.sin(), -first.sin(), first.cos())).view(2, 2)
    truth[2:, 2:] = torch.stack((second.cos(), second.sin(), -second.sin(), second.cos())).view(2, 2)
    torch.testing.assert_close(turned[0, :, 0], truth)


@pytest.mark.parametrize("kind", ["rope", "xpos"])
def test_ten_million_tokens_are_as_right_as_ten(kind):
    rotary = RotaryPositions(64, kind=kind, pattern=XPOS)
    q, k = tensors(50, 64, torch.float32)
    places = torch.arange(50) * 7 + 10_000_000
    result, truth = rotary(q, k, places), rotary(q.double(), k.double(), places)
    for ours, wide in zip(result, truth, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - wide).abs().max() < 1e-6
    in_float32 = places.float()[:, None] * 10000 ** (-torch.arange(0, 64, 2) / 64)
    assert (in_float32 - places[:, None] * 10000.0 ** (-torch.arange(0, 64, 2).double() / 64)).abs().max() > 0.1


def test_a_row_of_positions_for_each_sample():
    rotary = RotaryPositions(8)
    q, k = tensors(5, 8, batch=2, heads=3)
    places = torch.tensor([[0, 1, 2, 3, 4], [9, 8, 7, 100, 6]])
    both = rotary(q, k, places)
    for b in range(2):
        for ours, alone in zip(both, rotary(q[b : b + 1], k[b : b + 1], places[b]), strict=True):
            torch.testing.assert_close(ours[b : b + 1], alone)
    torch.testing.assert_close(rotary(q, k), rotary(q, k, torch.arange(5)))


def test_narrow_integers_do_not_wrap_around():
    rotary = RotaryPositions(8, kind="xpos", pattern=XPOS)
    q, k = tensors(5, 8)
    places = torch.tensor([0, 1, 17, 127, 100])
    torch.testing.assert_close(rotary(q, k, places.to(torch.uint8)), rotary(q, k, places))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_longest_segment_that_xpos_takes(dtype):
    """At the borders q and k are scaled by e^41 and e^-41: finite, and their scores as right as elsewhere."""
    length = 2 * RotaryPositions(8, kind="xpos").reach()
    rotary = RotaryPositions(8, kind="xpos", pattern=Pattern.dilated((length,), (1,)))
    q, k = tensors(6, 8, dtype)
    places = torch.tensor([0, 1, length // 2, length - 1, 5 * length, 6 * length - 1])
    result = scores(*rotary(q, k, places))[0, 0]
    assert result.isfinite().all()
    for i, j in ((1, 0), (2, 1), (2, 2), (3, 2), (3, 0), (5, 4)):
        distance = (places[i] - places[j]).item()
        truth = score(q[0, i, 0], k[0, j, 0], distance, 0, scale_base=512.0)
        assert abs(result[i, j] - truth) < (1e-4 if dtype == torch.float32 else 0.05)


def test_longnets_segments_fit_xpos():
    RotaryPositions(64, kind="xpos", pattern=Pattern.dilated((2048, 32768), (1, 16)))


def test_segments_are_cut_where_no_branchs_segment_straddles():
    def segment(*lengths):
        return RotaryPositions(8, kind="xpos", pattern=Pattern.dilated(lengths, [1] * len(lengths))).segment_length

    assert segment(4, 8) == 8
    assert segment(4, 6) == 12
    assert segment(251, 257, 263) is None  # 16,965,341: powers are counted from 0
    assert RotaryPositions(8, kind="xpos", pattern=Pattern.window(4) + XPOS).segment_length is None


def test_positions_beside_the_places_by_which_segments_are_cut():
    """Tokens 30 and 33 of one segment stand in different ones by their positions alone."""
    rotary = RotaryPositions(8, kind="xpos", scale_base=20.0, pattern=Pattern.dilated((64,), (1,)))
    q, k = tensors(64, 8)
    index = torch.arange(64)
    moved = rotary(q, k, index + 31, index=index)
    torch.testing.assert_close(scores(*moved), scores(*rotary(q, k)))
    assert (scores(*rotary(q, k, index + 31)) - scores(*moved)).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["rope", "xpos"])
def test_autocast_changes_nothing(kind):
    rotary = RotaryPositions(8, kind=kind, pattern=XPOS)
    q, k = tensors(40, 8, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        result = rotary(q, k)
    assert all(x.dtype == torch.bfloat16 for x in result)
    assert all(torch.equal(a, b) for a, b in zip(result, rotary(q, k), strict=True))
    truth = rotary(q.double(), k.double())
    torch.testing.assert_close(result, tuple(x.bfloat16() for x in truth))


@pytest.mark.parametrize("pattern", tiered([XPOS, Pattern.dense(is_causal=True)], quick=[XPOS]))
def test_compiles_in_one_graph(pattern):
    rotary = RotaryPositions(8, kind="xpos", pattern=pattern)
    q, k = tensors(20, 8)
    compiled = torch.compile(rotary, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k), rotary(q, k))
    places = torch.arange(20) + 5
    torch.testing.assert_close(
        compiled(q, k, places, index=torch.arange(20)), rotary(q, k, places, index=torch.arange(20))
    )
    with pytest.raises(RuntimeError, match="xpos with scale_base 512 takes positions at most 16,756 from"):
        compiled(q, k, places + 10**6, index=torch.arange(20))


def test_holds_no_state():
    rotary = RotaryPositions(8, kind="xpos", pattern=XPOS)
    assert not rotary.state_dict()
    assert not list(rotary.buffers())


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 20).flatmap(drawn.document_ids))
def test_document_index_counts_from_each_documents_first_token(ids):
    ids = ids or []
    truth = torch.tensor([i - ids.index(each) for i, each in enumerate(ids)], dtype=torch.long)
    assert torch.equal(document_index(torch.tensor(ids, dtype=torch.long)), truth)
    both = torch.tensor([ids, [3] * len(ids)], dtype=torch.long)
    assert torch.equal(document_index(both), torch.stack((truth, torch.arange(len(ids)))))


def x(*shape, **settings):
    return torch.zeros(shape or (1, 6, 2, 4), **settings)


def xpos(pattern=XPOS, **settings):
    return RotaryPositions(4, kind="xpos", pattern=pattern, **settings)


def under_autocast():
    with torch.autocast("cpu", torch.float16):
        xpos(Pattern.dilated((8192,), (1,)))(x(), x())


REFUSALS = {
    "odd": (lambda: RotaryPositions(7), "head_dim must be even, as pairs are turned, got 7"),
    "no head_dim": (lambda: RotaryPositions(0), "head_dim must be a positive integer, got 0"),
    "kind": (lambda: RotaryPositions(8, kind="alibi"), "kind must be one of 'rope', 'xpos', got 'alibi'"),
    "base": (lambda: RotaryPositions(8, base=0), "base must be a positive, finite number, got 0"),
    "scale_base": (lambda: xpos(scale_base=-1), "scale_base must be a positive, finite number, got -1"),
    "segment": (
        lambda: xpos(Pattern.dilated((64, 65536), (1, 2))),
        "xpos with scale_base 512 takes segments of at most 33,512 tokens in torch.float32, the pattern's are 65,536: "
        "raise scale_base to 1,002, or use rope",
    ),
    "segment in float16": (
        lambda: xpos(Pattern.dilated((8192,), (1,)))(x().half(), x().half()),
        "segments of at most 4,904 tokens in torch.float16, the pattern's are 8,192: raise scale_base to 856",
    ),
    "segment under autocast": (under_autocast, "segments of at most 4,904 tokens in torch.float16"),
    "tokens": (
        lambda: xpos(Pattern.window(8), scale_base=1)(x(1, 40, 2, 4), x(1, 40, 2, 4)),
        "xpos with scale_base 1 takes positions up to 32 in torch.float32 where the pattern's branches share no "
        "segment, got 40 tokens: raise scale_base to 2, or use rope",
    ),
    "position": (
        lambda: xpos(Pattern.window(8))(x(), x(), torch.arange(6) + 20_000),
        r"takes positions at most 16,756 from 0 in torch.float32 \(raise scale_base, or use rope\), got 20000",
    ),
    "position far from its index": (
        lambda: xpos()(x(), x(), torch.arange(6) + 20_000, index=torch.arange(6)),
        "takes positions at most 16,756 from the middle of a token's segment in torch.float32 .*, got 19984",
    ),
    "positions of floats": (
        lambda: RotaryPositions(4)(x(), x(), torch.zeros(6)),
        "positions must be integers, got torch.float32",
    ),
    "positions of a list": (
        lambda: RotaryPositions(4)(x(), x(), [0] * 6),
        "positions must be a tensor of integers, got list",
    ),
    "shape of positions": (
        lambda: RotaryPositions(4)(x(), x(), torch.arange(5)),
        r"positions must be \(tokens,\) or \(batch, tokens\), \(6,\) or \(1, 6\), got \(5,\)",
    ),
    "device of positions": (
        lambda: RotaryPositions(4)(x(), x(), torch.arange(6, device="meta")),
        "positions must be on the device of the tokens, cpu, got meta",
    ),
    "width of k": (
        lambda: RotaryPositions(4)(x(), x(1, 6, 2, 8)),
        r"k must be \(batch, tokens, heads, 4\), got shape \(1, 6, 2, 8\)",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("kind", ["rope", "xpos"])
def test_rows_at_odd_addresses_are_rotated_like_others(kind):
    """A view of pairs as complex numbers needs even strides and an even address."""
    rotary = RotaryPositions(4, kind=kind, pattern=XPOS)
    whole = torch.randn(2, 7, 3, 5)
    truth = rotary(whole[..., 1:].contiguous(), whole[..., :4].contiguous())
    for found, expected in zip(rotary(whole[..., 1:], whole[..., :4]), truth, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_factors_of_a_length_are_made_once_and_serve_training_after_inference():
    rotary, q = RotaryPositions(8), torch.randn(1, 29, 2, 8)
    with torch.inference_mode():
        first = rotary.factors(q, q)[0]
    assert RotaryPositions(8).factors(q, q)[0] is first
    assert RotaryPositions(8, base=500.0).factors(q, q)[0] is not first
    assert rotary.factors(q.double(), q.double())[0].dtype == torch.float64
    given = q.clone().requires_grad_()
    rotary(given, q)[0].square().sum().backward()
    torch.testing.assert_close(given.grad, 2 * q)  # a rotation keeps the sum of squares


def test_factors_of_a_long_sequence_are_not_kept(monkeypatch):
    monkeypatch.setattr(positions, "LARGEST_TABLE", 100)
    rotary, q = RotaryPositions(8), torch.randn(1, 13, 2, 8)
    first, second = rotary.factors(q, q)[0], rotary.factors(q, q)[0]
    assert first is not second
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, rotary.factors(q, q, torch.arange(13))[0], rtol=0, atol=0)


def test_a_rotation_is_one_product_in_each_direction():
    rotary, q = RotaryPositions(8), torch.randn(1, 31, 2, 8, requires_grad=True)
    counts = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            counts[operator.overloadpacket] += not operator.is_view
            return operator(*args, **(kwargs or {}))

    rotary(q, q)
    with Count():
        turned, _ = rotary(q, q)
        turned.sum().backward()
    assert counts[torch.ops.aten.mul] == 3  # of q and of k, and the gradient of q
    assert not {torch.ops.aten.add, torch.ops.aten.sub, torch.ops.aten.stack, torch.ops.aten.cat} & counts.keys()


def test_a_contiguous_tensor_at_an_odd_address():
    q = torch.randn(2 * 5 * 3 * 8 + 1)[1:].view(2, 5, 3, 8)
    rotary = RotaryPositions(8)
    torch.testing.assert_close(rotary(q, q)[0], rotary(q.clone(), q)[0], rtol=0, atol=0)


def _on_another_device(rotary, q):
    with torch.device("meta"):
        rotary(q, q)


def _under_fake_tensors(rotary, q):
    with FakeTensorMode(allow_non_fake_inputs=True):
        rotary(q, q)


def _in_a_transform(rotary, q):
    torch.func.grad(lambda x: rotary(x, x)[0].square().sum())(q)


@pytest.mark.parametrize("first", [_on_another_device, _under_fake_tensors, _in_a_transform])
def test_factors_that_are_kept_are_plain_whatever_the_first_call_was(first):
    positions._table.cache_clear()
    rotary, q = RotaryPositions(8), torch.randn(1, 11, 2, 8)
    expected = rotary(q, q, torch.arange(11))[0]
    first(rotary, q)
    torch.testing.assert_close(rotary(q, q)[0], expected, rtol=0, atol=0)
    assert positions._table(11, 8, 10000.0, torch.float32).numpy().shape == (11, 1, 4, 2)
