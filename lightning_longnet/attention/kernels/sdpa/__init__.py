"""torch's own attention, on CPU and on CUDA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lightning_longnet.attention.kernels.sdpa import cpu, cuda

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels import Request
    from lightning_longnet.attention.kernels.call import Call

name = "sdpa"


def note(request: Request) -> str:
    return cuda.note(request) if request.device == "cuda" else cpu.note


def refusals(request: Request) -> list[str]:
    reasons = []
    if request.device not in ("cpu", "cuda"):
        reasons.append(f"serves CPU and CUDA tensors, q is on {request.device}")
    reasons += cuda.refusals(request) if request.device == "cuda" else cpu.refusals(request)
    if request.value_dim != request.head_dim:
        reasons.append(f"needs v as wide as q and k, got {request.value_dim} and {request.head_dim}")
    if request.has_dropout:
        reasons.append("has no dropout")
    return reasons


def takes_weights(device: str) -> bool:
    # On CUDA a bias takes a block away from flash attention, is rounded to q's type, and splits heads that share a call
    return device == "cpu"


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """(batch, heads, rows, D) -> out, lse (batch, heads, rows); k and v may have fewer heads."""
    return _serving(q).forward(q, k, v, call)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one block of a larger softmax, whose `out` and `lse` are given: +inf where it shows no key."""
    return _serving(q).backward(grad, q, k, v, out, lse, call)


class _Device(Protocol):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def _serving(q: Tensor) -> _Device:
    return cuda if q.device.type == "cuda" else cpu
