"""CUDA's attention operators on a CPU: dense and slow, asserting what the true ones demand, check or misread.

Each call of torch's operators is put to their own meta functions, too.  Where the true ones leave memory unwritten or a
value, so do these: +inf or 0 as the log-sum-exp of a row without keys, NaN behind the last row.
"""

import sys
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from lightning_longnet.attention import prepared
from lightning_longnet.attention.kernels import cudnn, flash, fused, sdpa
from lightning_longnet.attention.kernels.sdpa import cuda, efficient
from lightning_longnet.attention.kernels.sdpa import flash as torchs

ATEN = torch.ops.aten
attend = import_module("lightning_longnet.attention.attend")  # the package has a function of that name
calls = []  # the operators that were called


def meta(x):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, torch.Tensor) else x


def checked(operator, emulate):
    """Return an operator that binds to the schema of the real one, and checks results against its meta function."""

    def call(*args, **kwargs):
        expected = operator(*map(meta, args), **{name: meta(x) for name, x in kwargs.items()})
        results = emulate(*args, **kwargs)
        for ours, theirs in zip(results, expected, strict=False):
            if ours is not None:
                assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        calls.append(operator.name().removeprefix("aten::"))
        return results + (None,) * (len(expected) - len(results))

    return call


def dense(q, k, seen, scale):
    """Return the scores (batch, heads, queries, keys) in float32, for k of as many heads."""
    scores = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()) * scale
    return scores.masked_fill(~seen, -torch.inf)


def softmax(q, k, v, scores):
    weights = (scores - scores.amax(-1, keepdim=True).clamp_min(-1e30)).exp()
    out = torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True).clamp_min(1e-30), v.float())
    return out.to(q.dtype), scores.logsumexp(-1)


def gradients(grad, q, k, v, out, lse, scores, scale):
    weights = (scores - lse[..., None]).exp()
    grad, mean = grad.float(), (grad.float() * out.float()).sum(-1).transpose(1, 2)[..., None]
    slopes = weights * (torch.einsum("bihd,bjhd->bhij", grad, v.float()) - mean) * scale
    dq = torch.einsum("bhij,bjhd->bihd", slopes, k.float())
    dk = torch.einsum("bhij,bihd->bjhd", slopes, q.float())
    return dq.to(q.dtype), dk.to(q.dtype), torch.einsum("bhij,bihd->bjhd", weights, grad).to(q.dtype)


def assert_loadable(*tensors):
    for x in tensors:
        assert x.stride(-1) == 1
        assert x.data_ptr() % 16 == 0
        assert all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])


def of_all_heads(x, heads):
    return x.repeat_interleave(heads // x.shape[2], 2)


# flash attention, (batch, rows, heads, D)


def assert_flash(q, k, v, *more):
    assert_loadable(q, k, v, *more)
    assert q.dtype in fused.HALF
    assert {x.dtype for x in (k, v, *more)} == {q.dtype}
    assert q.shape[3] % 8 == 0
    assert q.shape[3] <= 256
    assert k.shape == v.shape == (q.shape[0], k.shape[1], k.shape[2], q.shape[3])
    assert q.shape[2] % k.shape[2] == 0
    assert all(x.shape == q.shape for x in more)
    assert 0 not in (*q.shape, *k.shape)


def flash_seen(queries, keys, is_causal, left, right):
    """The windows that mha_fwd makes of its arguments: some of them are not those that it was given."""
    left, right = (-1 if side >= keys else side for side in (left, right))
    right = 0 if is_causal and queries > 1 else right
    if left < 0 <= right:
        left = keys
    elif right < 0 <= left:
        right = keys
    level = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    return seen if left < 0 else (key >= level - left) & (key <= level + right)


def flash_forward(q, k, v, scale, is_causal, left, right):
    assert_flash(q, k, v)
    assert isinstance(scale, float)
    k, v = of_all_heads(k, q.shape[2]), of_all_heads(v, q.shape[2])
    seen = flash_seen(q.shape[1], k.shape[1], is_causal, left, right)
    out, lse = softmax(q, k, v, dense(q, k, seen, scale))
    return out, lse.masked_fill(lse == -torch.inf, torch.inf)


def flash_backward(grad, q, k, v, out, lse, scale, is_causal, left, right):
    assert_flash(q, k, v, grad, out)
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    assert not (lse == -torch.inf).any(), "taken for 0"
    wide_k, wide_v = of_all_heads(k, q.shape[2]), of_all_heads(v, q.shape[2])
    seen = flash_seen(q.shape[1], k.shape[1], is_causal, left, right)
    dq, dk, dv = gradients(grad, q, wide_k, wide_v, out, lse, dense(q, wide_k, seen, scale), scale)
    dk, dv = (x.unflatten(2, (k.shape[2], -1)).sum(3) for x in (dk, dv))
    return dq, dk, dv


def torch_flash_forward(
    q,
    k,
    v,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
):
    assert cum_seq_q is None
    assert cum_seq_k is None
    assert (max_q, max_k, dropout_p, return_debug_mask) == (q.shape[1], k.shape[1], 0.0, False)
    return flash_forward(q, k, v, scale, is_causal, window_size_left, window_size_right)


def torch_flash_backward(
    grad,
    q,
    k,
    v,
    out,
    lse,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    rng_state,
    unused,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
):
    assert cum_seq_q is None
    assert cum_seq_k is None
    assert (max_q, max_k, dropout_p) == (q.shape[1], k.shape[1], 0.0)
    return flash_backward(grad, q, k, v, out, lse, scale, is_causal, window_size_left, window_size_right)


# memory-efficient attention, (batch, heads, rows, D)


def assert_efficient(q, k, v, bias, *more):
    operands = [x.transpose(1, 2) for x in (q, k, v, *more)]
    assert_loadable(*operands)
    assert q.dtype in (torch.float32, torch.bfloat16, torch.float16)
    assert {x.dtype for x in (k, v, *more)} == {q.dtype}
    assert q.shape[:2] == k.shape[:2] == v.shape[:2], "it knows no groups"
    assert q.shape[3] == k.shape[3]
    assert 0 not in (*q.shape, *k.shape)
    if bias is not None:
        assert bias.dtype == q.dtype
        assert bias.shape == (*q.shape[:3], k.shape[2])
        assert_loadable(bias)
        read = bias.as_strided((*bias.shape[:3], -(-bias.shape[3] // 16) * 16), bias.stride(), bias.storage_offset())
        assert not read.isnan().any(), "what lies behind the last key is read"
        assert (read[..., bias.shape[3] :] == 0).all()


def efficient_scores(q, k, bias, is_causal, scale):
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    scores = dense(q, k, seen.tril() if is_causal else seen, scale)
    return scores if bias is None else scores + bias.float()


def efficient_forward(q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    assert_efficient(q, k, v, bias)
    assert compute_log_sumexp
    assert dropout_p == 0
    assert not is_causal or k.shape[2] <= q.shape[2], "keys that no query sees"
    scores = efficient_scores(q, k, bias, is_causal, scale)
    rows, sums = softmax(*(x.transpose(1, 2) for x in (q, k, v)), scores)
    out = rows.transpose(1, 2)
    no_key = sums == -torch.inf
    lse = torch.full((*q.shape[:2], -(-q.shape[2] // 32) * 32), torch.nan)
    lse[..., : q.shape[2]] = sums.masked_fill(no_key, 0)
    return out.masked_fill(no_key[..., None], torch.nan), lse


def efficient_backward(
    grad, q, k, v, bias, out, lse, seed, offset, dropout_p, expected, is_causal=False, *, scale=None
):
    assert_efficient(q, k, v, bias, grad, out)
    assert out.transpose(1, 2).is_contiguous(), "its strides are not asked for"
    assert lse.shape == (*q.shape[:2], -(-q.shape[2] // 32) * 32)
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    assert (lse[..., q.shape[2] :] == torch.inf).all(), "no bounds are checked"
    assert not (lse == -torch.inf).any()
    assert (dropout_p, expected) == (0.0, [True, True, True, False])
    scores = efficient_scores(q, k, bias, is_causal, scale)
    operands = (x.transpose(1, 2) for x in (grad, q, k, v, out))
    results = gradients(*operands, lse[..., : q.shape[2]], scores, scale)
    return tuple(x.transpose(1, 2) for x in results)


# cuDNN's, (batch, heads, rows, D)


def assert_cudnn(q, k, v, is_causal, *more):
    assert_efficient(q, k, v, None, *more)
    assert q.dtype in fused.HALF
    assert q.shape[3] % 8 == 0
    assert q.shape[3] <= 128
    assert min(q.shape[2], k.shape[2]) > 1
    assert not is_causal or q.shape[2] == k.shape[2]


def cudnn_forward(
    q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
):
    assert_cudnn(q, k, v, is_causal)
    assert bias is None
    assert (compute_log_sumexp, dropout_p, return_debug_mask) == (True, 0.0, False)
    scores = efficient_scores(q, k, None, is_causal, scale)
    out, lse = softmax(*(x.transpose(1, 2) for x in (q, k, v)), scores)
    return out.transpose(1, 2), lse.unsqueeze(-1)


def cudnn_backward(
    grad,
    q,
    k,
    v,
    out,
    lse,
    seed,
    offset,
    bias,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    *,
    scale=None,
):
    assert_cudnn(q, k, v, is_causal, grad, out)
    assert bias is None
    assert cum_seq_q is None
    assert cum_seq_k is None
    assert (max_q, max_k, dropout_p) == (q.shape[2], k.shape[2], 0.0)
    assert grad.stride() == out.stride()
    assert lse.shape == (*q.shape[:3], 1)
    assert lse.is_contiguous()
    assert not (lse == -torch.inf).any()
    scores = efficient_scores(q, k, None, is_causal, scale)
    results = gradients(*(x.transpose(1, 2) for x in (grad, q, k, v, out)), lse.squeeze(-1), scores, scale)
    return tuple(x.transpose(1, 2) for x in results)


# the flash-attn package, with the signatures of 2.8


def _flash_attn_forward(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    return_softmax,
):
    assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0.0, 0.0, None, False)
    out, lse = flash_forward(q, k, v, softmax_scale, causal, window_size_left, window_size_right)
    calls.append("package forward")
    return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)


def _flash_attn_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
):
    assert (dropout_p, softcap, alibi_slopes, rng_state) == (0.0, 0.0, None, None)
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    window = causal, window_size_left, window_size_right
    results = flash_backward(dout, q, k, v, out, softmax_lse, softmax_scale, *window)
    for into, gradient in zip((dq, dk, dv), results, strict=True):
        assert into.stride(-1) == 1
        assert into.dtype == q.dtype
        into.copy_(gradient)
    calls.append("package backward")
    return torch.empty(0)


def package(version="2.8.3"):
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    for module in (package, interface):
        module.__spec__ = ModuleSpec(module.__name__, None)
    package.__version__ = version
    interface._flash_attn_forward, interface._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    return {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


OPERATORS = [
    (torchs, ATEN._flash_attention_forward.default, torch_flash_forward, torch_flash_backward),
    (efficient, ATEN._scaled_dot_product_efficient_attention.default, efficient_forward, efficient_backward),
    (cudnn, ATEN._scaled_dot_product_cudnn_attention.default, cudnn_forward, cudnn_backward),
]


@contextmanager
def device(capability=(9, 0), half=fused.HALF):
    """Let CPU tensors pass for CUDA's, and those of the types `half` for half ones: float32 shows smaller faults."""
    asked = prepared.request_of
    calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        for module, forward, emulate, emulate_backward in OPERATORS:
            patch.setattr(module, "_forward", checked(forward, emulate))
            patch.setattr(module, "_backward", checked(module._backward, emulate_backward))
        for name, module in package().items():
            patch.setitem(sys.modules, name, module)
        for module in (prepared, attend):
            patch.setattr(
                module, "request_of", lambda *args: asked(*args)._replace(device="cuda", capability=capability)
            )
        patch.setattr(torchs, "_capability", lambda _: capability)
        patch.setattr(cudnn, "_missing_reasons", tuple)
        patch.setattr(sdpa, "_module_of", lambda _: cuda)
        patch.setattr(sdpa, "takes_weights", lambda _: False)
        patch.setattr(fused, "HALF", half)
        flash._interface.cache_clear()
        cudnn._lse_dims.cache_clear()
        yield
    flash._interface.cache_clear()
    cudnn._lse_dims.cache_clear()
