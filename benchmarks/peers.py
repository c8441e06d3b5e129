"""The peers of `attend`, each called as its documentation does, on q, k, v (B, N, H, D).

torchscale and dilated-attention-pytorch do not run on a CPU as published, because they call a CUDA library for flash
attention.  Here the torch operator that `attend` uses replaces that call, so that the rest of their code is compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._context_parallel import _attention as context_parallel_templates

from lightning_longnet import Pattern, attend

if TYPE_CHECKING:
    from lightning_longnet.attention.pattern.pattern import HeadOffsets

Call = Callable[[Tensor, Tensor, Tensor], Tensor]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def ours(
    segment_lengths: list[int],
    dilation_rates: list[int],
    is_causal: bool,
    offsets: HeadOffsets = "interleaved",
    kernel: str = "auto",
    padding: float = 0.0,
    dropout: float = 0.0,
) -> Call:
    """Return a call of `attend`; `padding` is the share of the keys, at the end, that is hidden."""
    pattern = Pattern.dilated(segment_lengths, dilation_rates, is_causal, offsets)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = None
        if padding:
            hidden = torch.arange(q.shape[1], device=q.device).expand(q.shape[:2]) >= round(q.shape[1] * (1 - padding))
        return attend(q, k, v, pattern, key_padding_mask=hidden, dropout=dropout, kernel=kernel)

    return call


def dense(is_causal: bool) -> Call:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2)

    return call


def torchscale(
    path: str | None, heads: int, segment_lengths: list[int], dilation_rates: list[int], is_causal: bool
) -> Call | None:
    """Return a call of torchscale's DilatedAttention without projections, or None if no copy with LongNet is found."""
    if path:
        sys.path.insert(0, path)
    if find_spec("torchscale") is None or find_spec("torchscale.component.dilated_attention") is None:
        return None
    import torchscale.component.multihead_attention as multihead
    from torchscale.component.dilated_attention import DilatedAttention

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, dropout: float, bias: None, scale: None, is_causal: bool
    ) -> Any:
        out, lse = _flash(*(x.transpose(1, 2) for x in (q, k, v)), dropout, is_causal, scale=scale)
        return out.transpose(1, 2), lse

    multihead.flash_attn_func = flash_attn_func
    layer = DilatedAttention.__new__(DilatedAttention)  # without its projections
    nn.Module.__init__(layer)
    layer.num_heads, layer.dropout = heads, 0.0
    layer.args = SimpleNamespace(segment_length=segment_lengths, dilated_ratio=dilation_rates, flash_attention=True)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs, lses = [], []
        for w, r in zip(segment_lengths, dilation_rates, strict=True):
            parts = [
                layer.gathering(x, r, w, is_causal, is_kv=n > 0, seq_parall=False) for n, x in enumerate((q, k, v))
            ]
            out, lse = layer.attention_ops(*parts, is_causal=is_causal)
            outs.append(out)
            lses.append(lse)
        mixed: Tensor = layer.scattering(outs, lses, q.shape[1], q.shape[0])
        return mixed.unflatten(-1, (heads, -1))  # type: ignore[no-any-return]

    return call


def dilated_attention_pytorch(
    path: str | None, segment_lengths: list[int], dilation_rates: list[int], is_causal: bool
) -> Call | None:
    """Return a call of the DilatedAttention of dilated-attention-pytorch, or None if no copy is found."""
    if path:
        sys.path.insert(0, path)
    if find_spec("dilated_attention_pytorch") is None:
        return None
    if "xformers" not in sys.modules and find_spec("xformers") is None:
        operators: Any = ModuleType("xformers.ops")
        package: Any = ModuleType("xformers")
        package.ops = operators
        operators.AttentionOp, operators.LowerTriangularMask = object, object

        def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor, op: Any, attn_bias: Any) -> Tensor:
            is_causal = attn_bias is not None
            out: Tensor = _flash(*(x.transpose(1, 2) for x in (query, key, value)), 0.0, is_causal)[0]
            return out.transpose(1, 2)

        operators.memory_efficient_attention = memory_efficient_attention
        sys.modules |= {"xformers": package, "xformers.ops": operators}
    from dilated_attention_pytorch.dilated_attention import DilatedAttention

    layer = DilatedAttention(segment_lengths, dilation_rates)
    return lambda q, k, v: layer(q, k, v, is_causal=is_causal)


def ring_attention_pytorch(ranks: int) -> Call:
    """Return a call of the causal ring attention of ring-attention-pytorch over the ranks of the default group."""
    from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = ring_flash_attn(q, k, v, causal=True, bucket_size=1024, ring_reduce_col=True, ring_size=ranks)
        return out

    return call


def has_ring_attention_pytorch() -> bool:
    return find_spec("ring_attention_pytorch") is not None


def torch_ring(group: dist.ProcessGroup) -> Call:
    """Return a call of the causal ring attention of torch's context parallelism, with torch's operator for the CPU.

    `context_parallel` passes only operators for CUDA to these templates, which take any.  Ranks hold the tokens that
    the template expects by default: a chunk from the front and one from the back, as a zigzag places them.
    """

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = _TorchRing.apply(*(x.transpose(1, 2) for x in (q, k, v)), group)  # type: ignore[no-untyped-call]
        return out.transpose(1, 2)

    return call


class _TorchRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
        ring = context_parallel_templates._templated_ring_attention
        out, lse = ring(group, 2, _flash, q, k, v, is_causal=True, dropout_p=0.0)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group = group
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ring = context_parallel_templates._templated_ring_attention_backward
        tensors = dict(zip(("query", "key", "value", "out", "logsumexp"), ctx.saved_tensors, strict=True))
        grads = ring(ctx.group, 2, _flash_backward, grad, "grad_out", **tensors, is_causal=True, dropout_p=0.0)
        return *grads, None


def context_parallel_refusal() -> str:
    """Return the error with which torch's `context_parallel` fails on a CPU, or an empty text if it runs.

    The default group must not exist yet; the call makes it.
    """
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    q, k, v = torch.zeros(3, 1, 1, 8, 8).unbind()
    try:
        with context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]):
            F.scaled_dot_product_attention(q, k, v, is_causal=True)
    except NotImplementedError as error:
        return str(error)
    return ""
