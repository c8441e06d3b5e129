"""The kernel "sdpa": torch's own attention operators, on CPU and on CUDA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lightning_longnet.attention.kernels.sdpa import cpu, cuda

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels import Request
    from lightning_longnet.attention.kernels.call import Call

name = "sdpa"


def note(request: Request) -> str:
    """Return what this kernel runs for a call that it does not refuse.

    `judge` asks for it, and `explain` shows it in its table of kernels.
    """
    return cuda.note(request) if request.device == "cuda" else cpu.note


def refusals(request: Request) -> list[str]:
    """Return the reasons why torch's operators cannot compute a call; an empty list if they can.

    `select` asks for a call of `attend` that may run the kernel, and `judge` for `explain`, the guard's preflight and
    `longnet plan`.
    """
    reasons = []
    if request.device not in ("cpu", "cuda"):
        reasons.append(f"serves CPU and CUDA tensors, these are on {request.device}")
    reasons += cuda.refusals(request) if request.device == "cuda" else cpu.refusals(request)
    if request.value_dim != request.head_dim:
        reasons.append(f"needs v as wide as q and k, got {request.value_dim} and {request.head_dim}")
    reasons += request.lacks("has_dropout", "masks_later", "has_softcap")
    return reasons


def takes_weights(device: str) -> bool:
    """Return whether the kernel takes weights of pairs (`Block.repeats`), how often each counts: on CPU alone.

    `AttentionSpec.weighted_segments` asks before a plan is made, since a plan with weights has fewer pairs, and on a
    CPU `cut_parts`, which then joins small blocks.
    """
    # On CUDA a block with a bias cannot run in flash attention, its bias is rounded to the type of q, and heads with
    # different biases need a call each
    return device == "cpu"


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return out (batch, heads, rows, Dv) and lse (batch, heads, rows) of one block; see `BlockKernel`.

    `_forward` of blocks.py calls it, or `_forward_steps` where nothing is masked.
    """
    return _module_of(q).forward(q, k, v, call)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv of one block from the `out` and `lse` of the whole softmax; see `BlockKernel`.

    `_backward` of blocks.py calls it, or `_backward_steps` where nothing is masked.
    """
    return _module_of(q).backward(grad, q, k, v, out, lse, call)


class _DeviceModule(Protocol):
    """The operators of one kind of device, with the shapes of `BlockKernel`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Return out and lse of one block."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv of one block."""


def _module_of(q: Tensor) -> _DeviceModule:
    """Return the module that computes tensors on the device of q."""
    return cuda if q.device.type == "cuda" else cpu
