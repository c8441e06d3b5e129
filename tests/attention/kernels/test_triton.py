"""The kernel "triton" under Triton's interpreter: out, lse and gradients against the definition, pair by pair."""

from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import product

import drawn
import pytest
import torch
from brute import Shown
from compared import close, compare_attention
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreted import Interpreted
from split import compare, split_cases
from tiers import tiered

from lightning_longnet import Pattern, attend, explain
from lightning_longnet.attention.kernels import candidates
from lightning_longnet.attention.kernels.triton import joined
from lightning_longnet.attention.kernels.triton.arguments import Rows
from lightning_longnet.attention.plan.blocks import UNCUT, plan
from lightning_longnet.attention.spec import AttentionSpec

TOLERANCE = 2e-6  # of the largest true value, in float32


@pytest.fixture(scope="module")
def interpreted():
    with closing(Interpreted(1)) as result:
        yield result


@pytest.fixture(scope="module")
def ranks():
    with closing(Interpreted(3)) as result:
        yield result


def compared(group, case, dtype, tolerance, joins):
    """Compare a case in one launch for all branches wherever there can be one (`joins`), or in one for each."""
    joined.MOST_POSITIONS = 1e9 if joins else 0
    compare_attention(case, "triton", dtype, tolerance)


def case_of(shape, shown, **options):
    defaults = {"multiplicity": "multiset", "ids": None, "hidden": None, "dropout": 0.0, "mix": "exact", "seed": 0}
    return {"shape": shape, "shown": shown, **defaults, "layout": "contiguous", "planned": (True, 1024), **options}


LONGNET = [Shown(48, 1, causal=True), Shown(96, 2, causal=True), Shown(192, 4, causal=True)]
HIDDEN = [[i % 7 == 3 for i in range(150)]]
CASES = {
    # tiles without a mask, weights, a short last segment, and heads of no power of two
    "nested": case_of((1, 100, 1, 1, 24), LONGNET),
    "grouped heads": case_of((1, 250, 2, 1, 24), LONGNET),
    "documents and padding": case_of(
        (1, 150, 2, 2, 16), LONGNET, ids=[0] * 17 + [1] * 73 + [2] * 60, hidden=HIDDEN, layout="fused"
    ),
    # rectangles of negative weight, rows in no branch
    "set": case_of((1, 40, 1, 1, 16), [Shown(20, 2), Shown(33, 3)], multiplicity="set"),
    "window": case_of((2, 90, 1, 1, 16), [Shown(None, 1, window=20), Shown(90, 4)]),
    "detached": case_of((1, 90, 2, 2, 16), [replace(b, w=b.w // 4) for b in LONGNET], mix="detached"),
    "kept blocks": case_of((1, 128, 2, 2, 16), [Shown(64, 1, sparsity=("strided", 8, 0.35, 0, True))]),
    "zero keys": case_of((1, 50, 2, 2, 16), [Shown(16, 2, ragged="zero_keys"), Shown(32, 4, ragged="zero_keys")]),
}


@pytest.mark.parametrize(
    ("name", "joins"),
    tiered(
        product(CASES, (False, True)),
        quick=[("nested", True), ("set", False)],
        long=[(name, False) for name in ("window", "detached", "zero keys")],
    ),
)
def test_equals_the_definition(interpreted, name, joins):
    interpreted.run(1, compared, CASES[name], torch.float32, TOLERANCE, joins)


@pytest.mark.long
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=drawn.cases(), joins=st.booleans())
def test_equals_brute_force(interpreted, case, joins):
    batch, length, heads, kv_heads, dim = case["shape"]
    group = heads // kv_heads
    kv_heads = min(kv_heads, 2)  # a head more takes the interpreter longer, and shows nothing new
    case = case | {"shape": (min(batch, 2), length, kv_heads * group, kv_heads, dim)}
    if case["hidden"] is not None:
        case["hidden"] = case["hidden"][:2]
    if case["ids"] and isinstance(case["ids"][0], list):
        case["ids"] = case["ids"][:2]
    interpreted.run(1, compared, case, torch.float32, 1e-5, joins)


@pytest.mark.long
def test_float16_is_as_exact_as_its_numbers(interpreted):
    interpreted.run(1, compared, CASES["nested"], torch.float16, 4 * torch.finfo(torch.float16).eps, True)


def attended(group, inputs, options, repeats=1):
    """Return out, lse, the gradients, and the same once more for each repetition."""
    result = []
    for _ in range(repeats):
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        sinks = options.get("sinks")
        sinks = None if sinks is None else sinks.clone().requires_grad_()
        out, lse = attend(*leaves, kernel="triton", return_lse=True, **{**options, "sinks": sinks})
        expected = leaves if sinks is None else [*leaves, sinks]
        result.append([x.detach() for x in (out, lse, *torch.autograd.grad(out, expected, inputs[3]))])
    return result


@pytest.mark.long
def test_values_of_another_width_and_sinks(interpreted):
    generator = torch.Generator().manual_seed(0)
    widths = ((2, 24), (1, 24), (1, 40), (2, 40))
    inputs = [torch.randn(1, 70, heads, width, generator=generator) for heads, width in widths]
    pattern = Pattern.dilated((32, 64), (1, 2), is_causal=True)
    sinks = torch.randn(2, generator=generator)
    (result,) = interpreted.run(1, attended, inputs, {"pattern": pattern, "sinks": sinks})[0]
    leaves = [x.double().requires_grad_() for x in (*inputs[:3], sinks)]
    out, lse = attend(*leaves[:3], pattern, sinks=leaves[3], kernel="reference", return_lse=True)
    truth = (out, lse, *torch.autograd.grad(out, leaves, inputs[3].double()))
    for ours, true in zip(result, truth, strict=True):
        close(ours, true, TOLERANCE)


@pytest.mark.long
def test_the_same_bits_every_time(interpreted):
    inputs = [x.detach() for x in drawn.tensors((1, 90, 2, 1, 16), dtype=torch.float32)]
    pattern = Pattern.dilated((32, 64), (1, 2), is_causal=True)
    first, second = interpreted.run(1, attended, inputs, {"pattern": pattern}, 2)[0]
    assert all(map(torch.equal, first, second))


def attended_far(group, path, axis):
    """Attend to rows, heads or samples at such distances that offsets exceed 32 bits; return ours and the truth."""
    distance, count = 2**27, 18  # in numbers; the last begins behind 2**31 of them
    shape = [1, 3, 1, 16]
    shape[axis] = count
    stride = [0, 64, 0, 1]
    stride[axis] = distance
    # a file without data, whose pages take memory only where they are written
    storage = torch.UntypedStorage.from_file(str(path), True, 4 * (distance * count))
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for offset in (0, 16, 32, 48):
        x = torch.empty(0).set_(storage, offset, shape, stride)
        inputs.append(x.copy_(torch.randn(shape, generator=generator)))
    assert inputs[0].stride() == tuple(stride)
    assert (count - 1) * distance > 2**31
    pattern, results = Pattern.dilated((8, 16), (1, 2), is_causal=True), []
    for kernel, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs[:3]]
        out, lse = attend(*leaves, pattern, kernel=kernel, return_lse=True)
        results.append([x.detach() for x in (out, lse, *torch.autograd.grad(out, leaves, inputs[3].to(dtype)))])
    return results


@pytest.mark.parametrize("axis", tiered((0, 1, 2), quick=[1]))
def test_offsets_of_64_bits(interpreted, tmp_path, axis):
    ours, truth = interpreted.run(1, attended_far, tmp_path / "numbers", axis)[0]
    for one, true in zip(ours, truth, strict=True):
        close(one, true, TOLERANCE)


@pytest.mark.parametrize(
    ("world", "exchange"), tiered(product((2, 3), ("gather", "ring", "swap")), quick=[], long=[(3, "ring")])
)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_ranks_equal_brute_force(ranks, world, exchange, data):
    case, placement = data.draw(split_cases(world))
    batch, length, heads, kv_heads, dim = case["shape"]
    case = case | {"shape": (batch, length, heads // kv_heads, 1, dim), "dropout": 0.0}
    compare(ranks, world, exchange, case, placement, torch.float32, 1e-5, kernel="triton")


def test_says_what_it_does_not_serve():
    q = torch.zeros(1, 8, 2, 4)
    pattern = Pattern.dense()
    with pytest.raises(
        ValueError,
        match=r"kernel='triton' cannot serve this call: serves CUDA tensors, and CPU tensors under TRITON_INTERPRET=1, "
        r"these are on cpu\. Those that can: ",
    ):
        attend(q, q, q, pattern, kernel="triton")


def verdict(kernel, q, v, **options):
    return next(each for each in explain(q, q, v, Pattern.dense(), **options).verdicts if each.kernel == kernel)


def test_refuses_each_with_its_reason(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q = torch.zeros(1, 8, 2, 4)
    assert verdict("triton", q, q).refusals == ()
    assert explain(q, q, q, Pattern.dense()).chosen == "sdpa"
    assert explain(q, q, q, Pattern.dense(), kernel="triton").chosen == "triton"
    assert verdict("triton", q, q, dropout=0.1).refusals == ("has no dropout",)
    assert verdict("triton", q.double(), q.double()).refusals == (
        "serves float32, bfloat16 and float16, q is torch.float64",
    )
    assert verdict("triton", q, torch.zeros(1, 8, 2, 300)).refusals == ("needs heads of 256 at most, got 300",)
    assert verdict("triton", q.bfloat16(), q.bfloat16()).refusals == (
        "Triton's interpreter multiplies the bits of bfloat16 as integers",
    )


def test_auto_and_guards_leave_it_out_unless_it_is_named():
    assert "triton" not in candidates("auto")
    assert candidates("triton")[-1] == "triton"


def test_computes_pairs_once_for_any_number_of_threads():
    spec = AttentionSpec(Pattern.dilated((64, 128), (1, 2)), "triton")
    assert spec.weighted_segments("cuda", samples=1, threads=64) == UNCUT
    assert spec.weighted_segments("cuda", samples=1, threads=64, per_branch=True) == 0


@pytest.fixture
def launched(monkeypatch):
    """The names and arguments of the programs that are launched; nothing is computed."""
    from lightning_longnet.attention.kernels.triton import launch

    programs = []
    plan.cache_clear()  # the parts of a plan keep their launches

    def record(program, launched, arguments):
        programs.append((program.__name__, arguments))

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(launch, "_launch", record)
    return programs


FIVE = Pattern.dilated([16 * 2**i for i in range(5)], [2**i for i in range(5)], is_causal=True)
DOCUMENTS = torch.arange(256)[None] // 200
PADDING = torch.arange(256)[None] % 7 == 3
LAUNCHES = {
    "one branch": (Pattern.dense(is_causal=True), 4, {}, 1),
    "window": (Pattern.window(20, is_causal=True), 4, {}, 1),
    "five branches": (FIVE, 4, {}, 5),
    "grouped heads": (FIVE, 1, {}, 5),
    "padding": (FIVE, 4, {"key_padding_mask": PADDING}, 5),
    "documents": (FIVE, 4, {"documents": DOCUMENTS}, 5),
    "all of it": (FIVE, 2, {"documents": DOCUMENTS, "key_padding_mask": PADDING}, 5),
}


@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("name", LAUNCHES)
def test_one_launch_forward_and_two_backward(launched, monkeypatch, name, joins):
    """For all branches or for each, whatever the number of heads, documents, segments and masks is."""
    monkeypatch.setattr(joined, "MOST_POSITIONS", 1e9 if joins else 0)
    pattern, kv_heads, options, branches = LAUNCHES[name]
    branches = 1 if joins else branches
    q, k, v = (torch.zeros(1, 256, heads, 16, requires_grad=True) for heads in (4, kv_heads, kv_heads))
    if "documents" in options:
        options = options | {"documents": options["documents"].clone()}  # plans are kept for the memory of documents
    out = attend(q, k, v, pattern, kernel="triton", **options)
    assert [name for name, _ in launched] == ["forward"] * branches
    launched.clear()
    out.sum().backward()
    assert [name for name, _ in launched] == ["query_gradient"] * branches + ["key_gradients"] * branches


GRADIENTS = {
    "one launch": (FIVE, True, {}, torch.float16),
    "padded": (FIVE, True, {"key_padding_mask": PADDING}, torch.float16),
    "rows in no branch": (Pattern.dilated((64,), (4,)), True, {}, torch.float16),
    "a launch for each branch": (FIVE, False, {}, torch.float32),
    "detached": (FIVE, True, {"mix": "detached"}, torch.float32),
    "several lines": (FIVE, True, {"ordering": "hilbert"}, torch.float32),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_rounded_once(launched, monkeypatch, name):
    """One launch writes them in the type of their tensors; what more is added to is held in float32."""
    pattern, joins, options, dtype = GRADIENTS[name]
    monkeypatch.setattr(joined, "MOST_POSITIONS", 1e9 if joins else 0)
    q, k, v = (torch.zeros(1, 256, 4, 16, dtype=torch.float16, requires_grad=True) for _ in range(3))
    out = attend(q, k, v, pattern, kernel="triton", **options)
    launched.clear()
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert {x.dtype for x in gradients} == {torch.float16}
    results = [(result,) if isinstance(result, Rows) else result for _, (*_, result, _, _, _, _) in launched]
    assert {rows.data.dtype for each in results for rows in each} == {dtype}


def test_programs_run_on_the_device_of_their_tensors(monkeypatch):
    from lightning_longnet.attention.kernels.triton import launch
    from lightning_longnet.attention.kernels.triton.arguments import Lists

    active = []

    @contextmanager
    def device_of(x):
        active.append(x)
        yield
        active.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    items, result = torch.zeros(3, 5), []
    lists = Lists(items, items, items, 2)
    program = {(6,): lambda *_, **__: result.append(active[-1] is items)}
    launch._launch(program, launch._Launch(0, lists, None, (6,), {}), (lists,))
    assert result == [True]
