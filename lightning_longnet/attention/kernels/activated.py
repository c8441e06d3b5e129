"""The kernels "flash3" and "flash4": FlashAttention 3 and 4, which torch can put behind its own flash operators.

torch keeps one such implementation for the whole process.  Here it is active while the operators of one block are
called, and what was active before is active again afterwards.  In this time torch's flash attention of other threads
runs in it, too.
"""

from __future__ import annotations

from contextlib import contextmanager
from importlib.util import find_spec
from threading import RLock
from typing import TYPE_CHECKING

import torch
from torch.nn import attention

from lightning_longnet.attention.kernels import fused
from lightning_longnet.attention.kernels.compiling import constant_result
from lightning_longnet.attention.kernels.sdpa import cuda
from lightning_longnet.attention.kernels.sdpa import flash as torch_flash

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lightning_longnet.attention.kernels import Request
    from lightning_longnet.attention.kernels.call import Call

# The names of torch.nn.attention that are used here; torch 2.13 has all of them
_NEEDED = (
    "activate_flash_attention_impl",
    "current_flash_attention_impl",
    "list_flash_attention_impls",
    "restore_flash_attention_impl",
)
_LOCK = RLock()  # of two threads that activate, each would restore what the other has activated


class ActivatedFlash:
    """A kernel whose blocks run in an implementation that is put behind torch's flash operators: a `BlockKernel`.

    Args:
        name: the value of the option `kernel` that selects it.
        implementation: its name in `torch.nn.attention.list_flash_attention_impls`.
        module: the module that brings it.
        majors: the first numbers of the compute capabilities that it serves.
        widest: the largest head_dim.
        has_windows: whether it computes blocks with a window; others than unmasked and causal ones go to "sdpa".
        deterministic: the first numbers of the compute capabilities on which its backward is deterministic.
    """

    def __init__(
        self,
        name: str,
        implementation: str,
        module: str,
        majors: tuple[int, ...],
        widest: int,
        has_windows: bool,
        deterministic: tuple[int, ...],
    ) -> None:
        self.name, self.implementation, self.module = name, implementation, module
        self.majors, self.widest, self.has_windows, self.deterministic = majors, widest, has_windows, deterministic

    def note(self, request: Request) -> str:
        """Return what this kernel would run for a call that it does not refuse.

        `judge` asks for it, and `explain` shows it in its table of kernels.
        """
        rest = "" if self.has_windows else "; blocks with windows go where sdpa sends them"
        return (
            f"{self.implementation} behind torch's flash operators, active in the whole process while a block is called"
            f"{rest}; its speed has not been measured"
        )

    def refusals(self, request: Request) -> list[str]:
        """Return the reasons why the implementation cannot compute a call; an empty list if it can.

        Only the device is named where the tensors are not on CUDA.  `select` asks for a call of `attend` that may run
        the kernel, and `judge` for `explain`, the guard's preflight and `longnet plan`.
        """
        if request.device != "cuda":
            return [f"serves CUDA tensors, these are on {request.device}"]
        reasons = [*_missing_reasons(self.implementation, self.module), *fused.refusals(request)]
        if request.capability is not None and request.capability[0] not in self.majors:
            needed = " or ".join(f"{major}.x" for major in self.majors)
            reasons.append("needs compute capability {}, got {}.{}".format(needed, *request.capability))
        if self.widest < request.head_dim <= fused.WIDEST:
            reasons.append(f"needs a head_dim of {self.widest} at most, got {request.head_dim}")
        if request.capability is not None and request.capability[0] not in self.deterministic and _is_deterministic():
            reasons.append("has no deterministic backward here, which torch.use_deterministic_algorithms asks for")
        reasons += request.lacks("is_padded", "has_dropout", "masks_later", "has_softcap")
        return reasons

    def takes_weights(self, device: str) -> bool:
        """Return False: the kernel takes no weights of pairs (`Block.repeats`).

        So a plan computes a pair in each branch that shows it; `AttentionSpec.weighted_segments` asks before it is
        made.
        """
        return False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Return out (batch, heads, rows, D) and lse (batch, heads, rows) of one block; see `BlockKernel`.

        Blocks that the implementation does not serve go to the CUDA operators of "sdpa".  `forward_blocks` calls it for
        each block of a plan, through `_forward` of blocks.py.
        """
        if not self._serves(call):
            return cuda.forward(q, k, v, call)
        with activated_implementation(self.implementation):
            return torch_flash.forward(q, k, v, call)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv of one block from the `out` and `lse` of the whole softmax; see `BlockKernel`.

        `_backward` of blocks.py calls it, or `_backward_steps` where nothing is masked.
        """
        if not self._serves(call):
            return cuda.backward(grad, q, k, v, out, lse, call)
        with activated_implementation(self.implementation):
            return torch_flash.backward(grad, q, k, v, out, lse, call)

    def _serves(self, call: Call) -> bool:
        """Return whether the implementation computes a block: without windows, only one without the bound `high`."""
        return self.has_windows or call.block.high is None


@contextmanager
def activated_implementation(implementation: str) -> Iterator[None]:
    """Activate an implementation of torch's flash operators in a `with` statement, and restore the former one after it.

    `ActivatedFlash` calls the operators of each block in it.
    """
    with _LOCK:
        before = attention.current_flash_attention_impl()
        if before == implementation:
            yield
            return
        attention.activate_flash_attention_impl(implementation)
        try:
            yield
        finally:
            if before is None:
                attention.restore_flash_attention_impl()
            else:
                attention.activate_flash_attention_impl(before)


@constant_result
def _missing_reasons(implementation: str, module: str) -> tuple[str, ...]:
    """Return why the installed torch and packages cannot run an implementation; empty if they can.

    torch.compile traces the choice of a kernel and cannot follow imports, so it takes this result for a constant.
    """
    if not all(hasattr(attention, name) for name in _NEEDED) or implementation not in _implementations():
        return (f"torch {torch.__version__} cannot put {implementation} behind its flash operators",)
    try:
        is_there = find_spec(module) is not None
    except ImportError:  # the package that would hold the module is not there, or is another one
        is_there = False
    return () if is_there else (f"{implementation} is not installed: there is no module {module}",)


def _implementations() -> list[str]:
    """Return the names of the implementations that this torch knows."""
    return attention.list_flash_attention_impls()


@constant_result
def _is_deterministic() -> bool:
    """Return whether the user asks torch for deterministic algorithms, as a constant of a compiled graph."""
    return torch.are_deterministic_algorithms_enabled()


FLASH3 = ActivatedFlash("flash3", "FA3", "flash_attn_interface", (9,), 256, True, (9,))
FLASH4 = ActivatedFlash("flash4", "FA4", "flash_attn.cute.interface", (9, 10), 128, False, (10,))
