"""The kernel "flash": the flash-attn package, if it is installed."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from lightning_longnet.attention.kernels import fused
from lightning_longnet.attention.kernels.compiling import constant_result

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lightning_longnet.attention.kernels import Request
    from lightning_longnet.attention.kernels.call import Call

name = "flash"
RELEASE = (2, 8)


def note(request: Request) -> str:
    """Return what this kernel runs for a call that it does not refuse.

    `judge` asks for it, and `explain` shows it in its table of kernels.
    """
    return "the flash-attn package: every block as it is, windows among them"


def refusals(request: Request) -> list[str]:
    """Return the reasons why the package cannot compute a call; an empty list if it can.

    `select` asks for a call of `attend` that may run the kernel, and `judge` for `explain`, the guard's preflight and
    `longnet plan`.
    """
    return package_refusals(request, _missing_reasons)


def package_refusals(request: Request, missing_reasons: Callable[[], tuple[str, ...]]) -> list[str]:
    """Return the reasons why operators of flash-attn, from wherever they come, cannot compute a call.

    The kernels "flash" and "hub" ask.

    Args:
        request: the call.
        missing_reasons: returns why they are not there; called for CUDA tensors alone.
    """
    if request.device != "cuda":
        return [f"serves CUDA tensors, these are on {request.device}"]
    reasons = [*missing_reasons(), *fused.refusals(request)]
    reasons += request.lacks("is_padded", "has_dropout", "masks_later", "has_softcap")
    return reasons


def takes_weights(device: str) -> bool:
    """Return False: the kernel takes no weights of pairs (`Block.repeats`).

    So a plan computes a pair in each branch that shows it; `AttentionSpec.weighted_segments` asks before it is made.
    """
    return False


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return out (batch, heads, rows, Dv) and lse (batch, heads, rows) of one block; see `BlockKernel`.

    `_forward` of blocks.py calls it, or `_forward_steps` where nothing is masked.
    """
    return fused.forward(Package(_interface()), q, k, v, call)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv of one block from the `out` and `lse` of the whole softmax; see `BlockKernel`.

    `_backward` of blocks.py calls it, or `_backward_steps` where nothing is masked.
    """
    return fused.backward(Package(_interface()), grad, q, k, v, out, lse, call)


@constant_result
def _missing_reasons() -> tuple[str, ...]:
    """Return the reasons why the package cannot be used on this machine; it is imported only for CUDA tensors.

    torch.compile traces the choice of a kernel and cannot follow imports, so it takes this result for a constant.
    """
    if find_spec("flash_attn") is None:
        return ("flash-attn is not installed",)
    try:
        interface = _interface()
    except ImportError as error:  # built for another torch, or another package of that name
        return (f"flash-attn cannot be imported: {error}",)
    version = getattr(import_module("flash_attn"), "__version__", "of no version")
    release = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if release < RELEASE or not hasattr(interface, "_flash_attn_forward"):
        return (f"needs flash-attn {RELEASE[0]}.{RELEASE[1]}, found {version}",)
    return ()


@lru_cache(1)
def _interface() -> Any:
    """Return the module that holds the package's operators."""
    return import_module("flash_attn.flash_attn_interface")


class Package:
    """The operators of the flash-attn package, with the signatures of `fused.Operator`.

    The kernels "flash" and "hub" give it to `fused.forward` and `fused.backward`.

    Args:
        interface: the module that holds them.
    """

    def __init__(self, interface: Any) -> None:
        self._interface = interface

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int) -> tuple[Tensor, Tensor]:
        """Return out and lse of one `Window`, whose bounds are `left` and `right`; `fused.forward` calls it."""
        out, lse, _, _ = self._interface._flash_attn_forward(
            q,
            k,
            v,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=(left, right) == (-1, 0),
            window_size_left=left,
            window_size_right=right,
            softcap=0.0,
            alibi_slopes=None,
            return_softmax=False,
        )
        return out, lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        left: int,
        right: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv of one `Window`, whose bounds are `left` and `right`; `fused.backward` calls it."""
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        self._interface._flash_attn_backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            dq,
            dk,
            dv,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=(left, right) == (-1, 0),
            window_size_left=left,
            window_size_right=right,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv
