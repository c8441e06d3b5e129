"""Linear maps whose float32 products run in the faster library of a CPU, in the forward and in the backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lightning_longnet.attention.kernels.products import routed_products, uses_onednn

# Multiply-adds from which on a linear map is computed here.  Below, a function of Python in the graph of gradients
# costs as much as the faster library saves
LEAST = 2**22
_FORWARD = nn.Linear.forward  # which a program may replace for all linear layers
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def projected(linear: nn.Module, x: Tensor) -> Tensor:
    """Return `linear(x)`, as `product` computes it where `linear` is an `nn.Linear` without hooks, and nothing more."""
    if type(linear) is nn.Linear and nn.Linear.forward is _FORWARD and not _has_any_global_hook():
        own = vars(linear)
        if "forward" not in own and not any(own[name] for name in _HOOKS):
            return product(x, linear.weight, linear.bias)
    called: Tensor = linear(x)
    return called


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `F.linear(x, weight, bias)`, with large float32 products in oneDNN on a CPU where MKL is slow."""
    if _is_large(x, weight) and uses_onednn():
        # of more dimensions F.linear returns a view, which could not be changed in place behind a function
        rows = x if x.dim() == 2 else x.flatten(0, -2)
        result: Tensor = _Product.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
        return result if x.dim() == 2 else result.unflatten(0, x.shape[:-1])
    return F.linear(x, weight, bias)


def _is_large(x: Tensor, weight: Tensor) -> bool:
    """Return whether the product of plain tensors on a CPU is large and computed in float32 now."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or type(weight) not in (Tensor, nn.Parameter):
        return False
    if not x.is_cpu or not x.dtype == weight.dtype == torch.float32 or x.numel() * len(weight) < LEAST:
        return False
    return (
        x.dim() > 1 and weight.is_cpu and not torch.is_autocast_enabled("cpu") and torch._C._get_tracing_state() is None
    )


class _Product(torch.autograd.Function):
    """`F.linear`, and its gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with routed_products():
            return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        needs_x, needs_weight, _ = ctx.needs_input_grad
        # what a frozen weight or a first layer needs no gradient of is not held
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_bias = ctx.needs_input_grad[2]
        with routed_products():
            dx = None if weight is None else grad @ weight
            rows = grad.reshape(-1, grad.shape[-1])
            dweight = None if x is None else rows.T @ x.reshape(-1, x.shape[-1])
        return dx, dweight, rows.sum(0) if needs_bias else None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None) -> Tensor:
        x, weight = ctx.saved_tensors
        with routed_products():
            parts = (None if dx is None else dx @ weight.T, None if dweight is None else x @ dweight.T, dbias)
            result: Tensor = sum(part for part in parts if part is not None)  # type: ignore[assignment]
        return result
