"""The kernel "hub": flash-attn as the kernels hub has built it for this torch, loaded by the package `kernels`.

Only a build that is in the cache of the Hugging Face Hub is used: a choice between kernels downloads nothing.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_longnet.attention.kernels import fused
from lightning_longnet.attention.kernels.compiling import constant_result
from lightning_longnet.attention.kernels.flash import Package, package_refusals

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels import Request
    from lightning_longnet.attention.kernels.call import Call

name = "hub"
REPOSITORY = "kernels-community/flash-attn2"
_DOWNLOAD = f"kernels.get_kernel({REPOSITORY!r}, version=2)"


def note(request: Request) -> str:
    """Return what this kernel runs for a call that it does not refuse.

    `judge` asks for it, and `explain` shows it in its table of kernels.
    """
    return f"{REPOSITORY} of the kernels hub: every block as it is; its speed has not been measured"


def refusals(request: Request) -> list[str]:
    """Return the reasons why the build cannot compute a call; an empty list if it can.

    `select` asks for a call of `attend` that may run the kernel, and `judge` for `explain`, the guard's preflight and
    `longnet plan`.
    """
    return package_refusals(request, _missing_reasons)


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
    """Return the reasons why no build can be used on this machine; it is looked up only for CUDA tensors.

    torch.compile traces the choice of a kernel and cannot follow imports, so it takes this result for a constant.
    """
    try:
        is_there = find_spec("kernels.utils") is not None
    except ImportError:
        is_there = False
    if not is_there:  # a folder of this name may be there, which Python takes for a package
        return ("the package kernels is not installed: pip install kernels",)
    if not _snapshots():
        return (f"{REPOSITORY} is not in the cache of the Hub: {_DOWNLOAD} downloads it",)
    try:
        interface = _interface()
    except (ImportError, OSError, ValueError) as error:  # no build for this torch, or one that does not load
        return (f"{REPOSITORY} cannot be loaded, {_DOWNLOAD} downloads a build for this torch: {error}",)
    if not hasattr(interface, "_flash_attn_forward"):
        return (f"{REPOSITORY} in the cache of the Hub has no operators of flash-attn 2.8",)
    return ()


@lru_cache(1)
def _interface() -> Any:
    """Return the module that holds the operators of the newest build in the cache."""
    return import_module("kernels").get_local_kernel(_snapshots()[0], "flash_attn2").flash_attn_interface


def _snapshots() -> list[Path]:
    """Return the folders of the downloaded versions, the newest first."""
    cache = import_module("kernels.utils").CACHE_DIR or import_module("huggingface_hub.constants").HF_HUB_CACHE
    versions = []
    for kind in ("kernels", "models"):  # the Hub moved the repositories of kernels from one to the other
        folder = Path(cache) / f"{kind}--{REPOSITORY.replace('/', '--')}"
        for ref in folder.glob("refs/*"):
            number = ref.name.removeprefix("v")
            snapshot = folder / "snapshots" / ref.read_text().strip()
            if snapshot.is_dir():
                versions.append((int(number) if number.isdecimal() else 0, kind == "kernels", snapshot))
    return [snapshot for *_, snapshot in sorted(versions, reverse=True)]
