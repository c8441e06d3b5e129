"""The contract's reference values, its edges, and what a call must survive: autocast, checkpointing, compilation."""

from itertools import product

import brute
import drawn
import pytest
import torch
import torch.nn.functional as F
from brute import Shown
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import tiered
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lightning_longnet import Pattern, attend, explain
from lightning_longnet.attention.kernels import block_calls, kernel_names
from lightning_longnet.attention.kernels.sdpa import cpu
from lightning_longnet.attention.spec import AttentionSpec

KERNELS = ["sdpa", "eager", "reference"]
LONGNET = Pattern.dilated((16, 32, 64), (1, 2, 4), is_causal=True)

# B, N, H, D; w; r; offsets; causal: sum y, norm y, norm dq, norm dk, norm dv
REFERENCE = {
    "blocked": (
        ((1, 16, 4, 8), (4, 8, 16), (1, 2, 4), "blocked", False),
        (2.8631925131, 7.0318506351, 5.6359859449, 3.6523027818, 8.1961336116),
    ),
    "interleaved": (
        ((1, 16, 4, 8), (4, 8, 16), (1, 2, 4), "interleaved", False),
        (3.4632304893, 7.1161616977, 5.8250711080, 3.7844305866, 8.6380156756),
    ),
    "causal": (
        ((2, 32, 4, 8), (8, 16, 32), (1, 2, 4), "blocked", True),
        (5.4565380279, 16.1134036263, 10.3203616123, 6.4391802118, 15.3106356060),
    ),
    "ragged": (
        ((1, 13, 4, 8), (4, 8), (1, 2), "blocked", False),
        (2.0252548027, 7.5097687737, 5.1516651299, 3.0422364379, 9.3182873865),
    ),
    "rate does not divide": (
        ((1, 16, 4, 8), (4, 8), (1, 3), "blocked", True),
        (0.9879583534, 10.4130191654, 4.8050846092, 2.8990279238, 14.3316873461),
    ),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("case", "truth"), REFERENCE.values(), ids=REFERENCE)
def test_reference_values(case, truth, kernel):
    shape, w, r, offsets, causal = case
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    q, k, v = 1.5 * (0.7 * i + 0.1).sin(), 1.5 * (1.3 * i + 0.2).sin(), (0.9 * i + 0.3).sin()
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    y = attend(q, k, v, Pattern.dilated(w, r, causal, offsets), kernel=kernel)
    grads = torch.autograd.grad((y * (0.37 * i).cos()).sum(), (q, k, v))
    result = [y.sum().item(), *(x.norm().item() for x in (y, *grads))]
    assert result == pytest.approx(truth, rel=0, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(
    case=drawn.cases(),
    length=st.integers(32, 64),
    head_dim=st.sampled_from([16, 32]),
    is_faster=st.booleans(),
)
def test_bfloat16_is_as_close_to_the_truth_as_torchs_own(case, length, head_dim, is_faster):
    """Against torch's SDPA in bfloat16, which gets the multiplicities as a mask."""
    batch, _, heads, kv_heads, _ = case["shape"]
    shown = [*case["shown"], Shown(w=7)]  # so that no row is empty, which torch's SDPA does not survive
    q, k, v, grad = drawn.tensors(
        (batch, length, heads, kv_heads, head_dim), case["layout"], torch.bfloat16, case["seed"]
    )
    tables = [brute.counts(shown, case["multiplicity"], length, kv_heads)] * batch
    scale = head_dim**-0.5
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    true_out = brute.attention(*wide, tables, scale)[0]
    true = (true_out, *torch.autograd.grad(true_out, wide, grad.double()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_half_is_faster", lambda _: is_faster)
        ours = attend(q, k, v, drawn.pattern_of(shown, case["multiplicity"]), scale=scale, kernel="sdpa")
        ours = (ours, *torch.autograd.grad(ours, (q, k, v), grad))
    mask = sum(tables[0]).log().repeat_interleave(heads // kv_heads, 0).bfloat16()[None]
    keys = (F.pad(x.transpose(1, 2), (0, 0, 0, mask.shape[-1] - length)) for x in (k, v))  # and those of zeros
    torchs = F.scaled_dot_product_attention(
        q.transpose(1, 2), *keys, attn_mask=mask, scale=scale, enable_gqa=True
    ).transpose(1, 2)
    torchs = (torchs, *torch.autograd.grad(torchs, (q, k, v), grad))
    for a, b, truth in zip(ours, torchs, true, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - truth).norm() <= 2 * (b.double() - truth).norm()


@pytest.mark.parametrize("mix", ["exact", "detached"])
def test_half_results_of_documents_with_unequal_lengths_are_merged(monkeypatch, mix):
    monkeypatch.setattr(cpu, "_half_is_faster", lambda _: True)
    q, k, v, grad = drawn.tensors((1, 12, 2, 2, 8), dtype=torch.bfloat16)
    ids = torch.tensor([0, 0, 0, 1, 2, 2, 2, 3, 3, 4, 4, 4])  # neither evenly spaced nor long enough for a call each
    result = attend(q, k, v, LONGNET, documents=ids, mix=mix, kernel="sdpa")
    truth = attend(q, k, v, LONGNET, documents=ids, mix=mix, kernel="eager")
    torch.testing.assert_close(result, truth, rtol=0.05, atol=0.02)
    grads = (torch.autograd.grad(out, (q, k, v), grad) for out in (result, truth))
    torch.testing.assert_close(*grads, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_without_keys_are_zero_and_their_gradients_finite(kernel):
    # two heads serve residues 0 and 1 of 4: the rest of the rows see nothing
    q, k, v, grad = drawn.tensors((2, 19, 2, 2, 4))
    out, lse = attend(q, k, v, Pattern.dilated((8,), (4,)), kernel=kernel, return_lse=True)
    served = torch.tensor([[(i % 8) % 4 == h for i in range(19)] for h in range(2)])
    assert (out.transpose(1, 2)[:, ~served] == 0).all()
    assert (lse[:, ~served] == -torch.inf).all()
    assert lse[:, served].isfinite().all()
    for result in torch.autograd.grad(out, (q, k, v), grad):
        assert result.isfinite().all()
        assert (result.transpose(1, 2)[:, ~served] == 0).all()
        assert (result.transpose(1, 2)[:, served] != 0).any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_log_sum_of_exactly_zero_is_not_taken_for_no_key(kernel):
    # q = 0 makes every score 0, and a row that sees one key has lse = log 1 = 0
    q, k, v, _ = drawn.tensors((1, 6, 1, 1, 4))
    out, lse = attend(q * 0, k, v, Pattern.window(1) + Pattern.dilated((4,), (2,)), kernel=kernel, return_lse=True)
    counts = Pattern.window(1).mask(6, 1) + Pattern.dilated((4,), (2,)).mask(6, 1)
    torch.testing.assert_close(lse[0], counts.sum(-1).double().log())
    torch.testing.assert_close(out[0, 1, 0], v[0, 1, 0])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(0, 5, 2, 1, 4), (2, 0, 2, 2, 4)], ids=["no sample", "no token"])
def test_nothing_in_nothing_out(kernel, shape):
    q, k, v, grad = drawn.tensors(shape)
    out, lse = attend(q, k, v, LONGNET, kernel=kernel, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (shape[0], shape[2], shape[1])
    assert [x.shape for x in torch.autograd.grad(out, (q, k, v), grad)] == [q.shape, k.shape, v.shape]


def test_one_token_gets_its_own_value():
    q, k, v, _ = drawn.tensors((3, 1, 4, 2, 5))
    torch.testing.assert_close(attend(q, k, v, LONGNET), v.repeat_interleave(2, dim=2))


@pytest.mark.parametrize("kernel", KERNELS)
def test_values_may_be_wider_than_keys_where_the_kernel_serves_it(kernel):
    q, k, _, _ = drawn.tensors((1, 9, 2, 2, 4))
    v = torch.randn(1, 9, 2, 6, dtype=torch.float64)
    if kernel == "sdpa":
        with pytest.raises(
            ValueError, match="kernel='sdpa' cannot serve this call: needs v as wide as q and k, got 6 and 4"
        ):
            attend(q, k, v, LONGNET, kernel="sdpa")
        return
    out = attend(q, k, v, LONGNET)
    torch.testing.assert_close(out[..., :4], attend(q, k, v[..., :4].contiguous(), LONGNET))


@settings(max_examples=40, deadline=None)
@given(case=drawn.cases(), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_packed_documents_equal_each_alone(case, lengths):
    batch, _, heads, kv_heads, dim = case["shape"]
    pattern = drawn.pattern_of(case["shown"], case["multiplicity"])
    q, k, v, grad = drawn.tensors((batch, sum(lengths), heads, kv_heads, dim), case["layout"], seed=case["seed"])
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    packed = attend(q, k, v, pattern, documents=ids, mix=case["mix"])
    alone = torch.cat(
        [
            attend(*parts, pattern, mix=case["mix"])
            for parts in zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)
        ],
        1,
    )
    torch.testing.assert_close(packed, alone)
    for a, b in zip(
        torch.autograd.grad(packed, (q, k, v), grad), torch.autograd.grad(alone, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_the_past_does_not_depend_on_the_future():
    q, k, v, _ = drawn.tensors((1, 50, 4, 4, 8))
    before = attend(q, k, v, LONGNET)
    with torch.no_grad():
        for x in (q, k, v):
            x[:, 30:] = 1e3
    torch.testing.assert_close(attend(q, k, v, LONGNET)[:, :30], before[:, :30], rtol=0, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mix", ["exact", "detached"])
def test_large_scores_do_not_overflow(kernel, mix):
    for size, tolerance in ((30, 1e-2), (1e3, 0.5)):  # float32 rounds scores of a million by a tenth
        q, k, v, grad = drawn.tensors((1, 64, 2, 2, 8), dtype=torch.float32)
        pattern = Pattern.dilated((8, 64), (1, 2), True)
        out = attend(q * size, k * size, v, pattern, kernel=kernel, mix=mix)
        wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
        truth = attend(wide[0] * size, wide[1] * size, wide[2], pattern, kernel="reference", mix=mix)
        torch.testing.assert_close(out.double(), truth, rtol=0, atol=tolerance)
        assert all(x.isfinite().all() for x in torch.autograd.grad(out, (q, k, v), grad))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_score_that_overflows_is_seen_by_none_that_cannot_see_its_key(kernel):
    q, k, v, _ = (x.detach() for x in drawn.tensors((1, 64, 1, 1, 8), dtype=torch.float32))
    q, k = q.abs(), k.clone()
    k[0, 40] = torch.inf
    out = attend(q, k, v, Pattern.dense(True), kernel=kernel)
    assert out[:, :40].isfinite().all()
    torch.testing.assert_close(out[:, :40], attend(q[:, :40], k[:, :40], v[:, :40], Pattern.dense(True)))


CUT = {
    "longnet": LONGNET,
    "window": Pattern.window(9, True) + Pattern.dilated((30,), (1,)),
    "broad window": Pattern.window(600),
    "dense": Pattern.dense(),
}


@pytest.mark.parametrize(
    ("threads", "name"),
    tiered(product([1, 4], CUT), quick=[(1, "longnet"), (4, "longnet"), (4, "window"), (1, "dense")]),
)
def test_calls_are_cut_to_size_without_changing_the_answer(monkeypatch, threads, name):
    pattern = CUT[name]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    q, k, v, grad = drawn.tensors((2, 1400 if pattern == Pattern.window(600) else 330, 4, 2, 4))
    documents = torch.arange(q.shape[1]) // 1000
    results = []
    for share in (1e-9, 1 / 8, 1e9):
        monkeypatch.setattr(block_calls, "WHOLE_BYTES", 0)  # these results are small: they would not be cut
        monkeypatch.setattr(block_calls, "CALL_SHARE", share)
        out = attend(q, k, v, pattern, documents=documents)
        results.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    out = attend(q, k, v, pattern, documents=documents, kernel="reference")
    results.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-10)


def test_pairs_computed_once_leave_the_detached_mixture_its_branches():
    q, k, v, grad = drawn.tensors((1, 16, 2, 2, 4))
    pattern = Pattern.dilated((4, 16), (1, 2))
    with drawn.planned(True, 1024):
        result = attend(q, k, v, pattern, mix="detached")
        result = (result, *torch.autograd.grad(result, (q, k, v), grad))
    truth = attend(q, k, v, pattern, mix="detached", kernel="reference")
    torch.testing.assert_close(result, (truth, *torch.autograd.grad(truth, (q, k, v), grad)))


def test_expanded_tensors_and_gradients_are_read_right():
    q, k, v, _ = drawn.tensors((1, 20, 4, 4, 8))
    shared = k[:, :, :1].expand(-1, -1, 4, -1)
    (result,) = torch.autograd.grad(attend(q, shared, v, LONGNET).sum(), k)  # sum gives a gradient of stride 0
    (truth,) = torch.autograd.grad(attend(q, shared, v, LONGNET, kernel="reference").sum(), k)
    torch.testing.assert_close(result, truth)


def test_a_second_derivative_is_refused_by_name_or_served_by_the_reference():
    q, k, v, grad = drawn.tensors((1, 12, 2, 2, 4))
    first = torch.autograd.grad(attend(q, k, v, LONGNET), q, grad, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="attend has no second derivative; kernel='reference' has"):
        first.sum().backward()
    first = torch.autograd.grad(attend(q, k, v, LONGNET, kernel="reference"), q, grad, create_graph=True)[0]
    first.sum().backward()
    assert q.grad.abs().sum() > 0


FORWARD_MODE = "has no derivative in forward mode; kernel='reference' has"


def test_a_derivative_in_forward_mode_is_refused_by_name_or_served_by_the_reference():
    q, k, v, tangent = (x.detach() for x in drawn.tensors((1, 12, 2, 2, 4)))
    with pytest.raises(NotImplementedError, match=f"attend {FORWARD_MODE}"):
        torch.func.jvp(lambda x: attend(x, k, v, LONGNET), (q,), (tangent,))
    derivative = torch.func.jvp(lambda x: attend(x, k, v, LONGNET, kernel="reference"), (q,), (tangent,))[1]
    step = 1e-6
    near = [attend(q + sign * step * tangent, k, v, LONGNET) for sign in (1, -1)]
    torch.testing.assert_close(derivative, (near[0] - near[1]) / (2 * step), rtol=1e-6, atol=1e-7)


def test_forward_mode_over_a_backward_is_refused_by_name():
    q, k, v, tangent = drawn.tensors((1, 12, 2, 2, 4))
    with forward_ad.dual_level():
        for inputs in ((forward_ad.make_dual(q, tangent), k, v), (q.detach(), forward_ad.make_dual(k, tangent), v)):
            with pytest.raises(NotImplementedError, match=f"attend {FORWARD_MODE}"):
                attend(*inputs, LONGNET)
        out = attend(q, k, v, LONGNET)
        with pytest.raises(NotImplementedError, match=f"attend_backward {FORWARD_MODE}"):
            torch.autograd.grad(out, q, forward_ad.make_dual(torch.ones_like(out), tangent))


def test_lse_carries_no_gradient():
    q, k, v, _ = drawn.tensors((1, 12, 2, 2, 4))
    for kernel in KERNELS:
        assert not attend(q, k, v, LONGNET, kernel=kernel, return_lse=True)[1].requires_grad


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_leaves():
    q, k, v, grad = drawn.tensors((1, 40, 4, 2, 8), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attend(q, k.bfloat16(), v, LONGNET, return_lse=True)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    truth = attend(*(x.bfloat16() for x in (q, k, v)), LONGNET)
    assert torch.equal(out, truth)
    assert [x.dtype for x in torch.autograd.grad(out, (q, k, v), grad.bfloat16())] == [torch.float32] * 3


@pytest.mark.parametrize("kernel", ["eager", "reference"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_no_product_is_rounded_under_autocast(kernel, dropout):
    q, k, v, grad = drawn.tensors((1, 40, 4, 2, 8), dtype=torch.float32)
    options = {"kernel": kernel, "dropout": dropout, "dropout_seed": 3, "return_lse": True}
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    truth = attend(*half, LONGNET, **options)
    true_grads = torch.autograd.grad(truth[0], half, grad.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        result = attend(q, k, v, LONGNET, **options)
        # torch's own derivatives, which are the reference's, follow autocast
        if kernel == "eager":
            grads = torch.autograd.grad(result[0], (q, k, v), grad.bfloat16())
    if kernel == "reference":
        grads = torch.autograd.grad(result[0], (q, k, v), grad.bfloat16())
    assert all(torch.equal(a, b.float()) for a, b in zip(grads, true_grads, strict=True))
    assert result[1].dtype == torch.float32
    assert torch.equal(result[1], truth[1])
    assert torch.equal(result[0], truth[0])


def test_rows_that_lie_across_one_another_are_read_right():
    x = torch.randn(1, 70, dtype=torch.float32)
    q = x.unfold(1, 8, 1)[:, :, None]  # (1, 63, 1, 8) with a row stride of 1
    torch.testing.assert_close(attend(q, q, q, LONGNET), attend(q, q, q, LONGNET, kernel="reference"))


def test_float32_within_autocast_stays_float64_for_float64():
    q, k, v, _ = drawn.tensors((1, 8, 2, 2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(q, k, v, LONGNET).dtype == torch.float64


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    result = []
    for call in (attend, lambda *args: checkpoint(attend, *args, use_reentrant=reentrant)):
        q, k, v, grad = drawn.tensors((2, 40, 4, 2, 8))
        out = call(q, k, v, LONGNET)
        out.backward(grad)
        result.append((out, q.grad, k.grad, v.grad))
    assert all(torch.equal(a, b) for a, b in zip(*result, strict=True))


def test_what_is_kept_for_the_backward():
    q, k, v, _ = drawn.tensors((1, 64, 4, 2, 8), dtype=torch.float32)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        out, lse = attend(q, k, v, LONGNET, return_lse=True)
    assert set(kept) == {x.data_ptr() for x in (q, k, v, out, lse)}


def test_both_operators_pass_torchs_own_checks():
    q, k, v, grad = (x.detach() for x in drawn.tensors((2, 24, 4, 2, 8), dtype=torch.float32))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    documents, hidden = torch.arange(24).expand(2, 24) // 5, torch.arange(24).expand(2, 24) > 20
    for conditions, dropout, kernel in [
        ((None, None, None), 0.0, "sdpa"),
        ((documents, None, None), 0.0, "sdpa"),
        ((None, hidden, torch.tensor(7)), 0.2, "eager"),
    ]:
        sinks = torch.arange(4.0) if dropout == 0 else None
        options = sinks, *conditions, AttentionSpec(LONGNET, kernel, 0.3, dropout).dumps(), None
        torch.library.opcheck(torch.ops.lightning_longnet.attend, (q, k, v, *options), test_utils=tests)
        out, lse, kept = torch.ops.lightning_longnet.attend(q, k, v, *options)
        arguments = (grad, q, k, v, out, lse, kept, *options)
        torch.library.opcheck(torch.ops.lightning_longnet.attend_backward, arguments, test_utils=tests)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_block_gives_equal_results():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).unbind(2)
            return x + attend(q, k, v, LONGNET).flatten(2)

    block, x = Block(), torch.randn(2, 40, 16)
    compiled = torch.compile(block, backend="aot_eager")
    breaks = torch._dynamo.explain(block)(x).graph_break_count
    assert breaks == 0
    for length in (40, 33):
        a, b = block(x[:, :length]), compiled(x[:, :length])
        torch.testing.assert_close(a, b)
        for one, other in zip(
            torch.autograd.grad(a.square().sum(), block.parameters()),
            torch.autograd.grad(b.square().sum(), block.parameters()),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


def test_explain_says_who_runs_and_why_others_do_not():
    q = torch.zeros(1, 8, 2, 4)
    head, *lines = str(explain(q, q, torch.zeros(1, 8, 2, 6), Pattern.dense())).splitlines()
    assert head == "cpu, float32, accumulates in float32"
    assert [line.split()[0] for line in lines] == list(kernel_names())
    shown = {line.split()[0]: line.split(maxsplit=2)[1:] for line in lines}
    for kernel in ("flash", "cudnn", "flash3", "flash4", "hub"):
        assert shown[kernel] == ["refuses", "serves CUDA tensors, these are on cpu"]
    assert shown["sdpa"] == ["refuses", "needs v as wide as q and k, got 6 and 4"]
    assert [shown[kernel][0] for kernel in ("eager", "reference")] == ["runs", "could"]
    assert explain(q, q, q, Pattern.dense()).chosen == "sdpa"
    assert verdict(explain(q, q, q, Pattern.dense(), dropout=0.1), "sdpa").refusals == ("has no dropout",)
    assert explain(q, q, q, Pattern.dense(), kernel="reference").chosen == "reference"
    assert verdict(explain(*[q.to("meta")] * 3, Pattern.dense()), "sdpa").refusals == (
        "serves CPU and CUDA tensors, these are on meta",
    )


def verdict(explanation, kernel):
    return next(each for each in explanation.verdicts if each.kernel == kernel)
