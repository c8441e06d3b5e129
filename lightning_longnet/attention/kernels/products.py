"""The choice of the library that computes the float32 matrix products of a CPU."""

from __future__ import annotations

import os
import platform
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from collections.abc import Iterator


# Multiply-adds of a head's products in a forward and in a backward, from which on oneDNN is the faster library.  A call
# of oneDNN costs more: on an EPYC it took 20 times as long at 16 tokens, and half as long at 1,024
LEAST_FORWARD, LEAST_BACKWARD = 2**22, 2**23


@contextmanager
def routed_products(size: float = float("inf"), least: int = LEAST_FORWARD) -> Iterator[None]:
    """Send float32 products to oneDNN within this context, if MKL is slow on this CPU and oneDNN does not round.

    MKL runs at half speed or less on some CPUs that Intel has not made; on Intel's own it is the faster library.
    Setting the precision of products to "bf16" sends them to oneDNN, which rounds to bf16 only on a CPU with
    instructions for it; on such a CPU the setting is left alone.  While it is set, torch raises in other threads that
    read its float32 precision.  The modules eager and squares, torch's operator for CPU, the threads of a call (`run`),
    linear layers and the loss over a vocabulary use it.

    Args:
        size: the multiply-adds of a head's products, rows times keys times width.
        least: the size from which on products are sent to oneDNN.
    """
    if size < least or not uses_onednn():
        yield
        return
    with _setting.routed():
        yield


class _Setting:
    """The precision of torch's float32 products, which is one global setting for all threads.

    The first thread that enters saves the user's choice, and the last one that leaves restores it.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = Lock(), 0, "none"

    @contextmanager
    def routed(self) -> Iterator[None]:
        """Set the precision to "bf16" within this context; `routed_products` and `_is_exact` use it."""
        products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        with self._lock:
            if self._inside == 0:
                self._before = products.fp32_precision
                products.fp32_precision = "bf16"
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                # what another thread has set in the meantime stays
                if self._inside == 0 and products.fp32_precision == "bf16":
                    products.fp32_precision = self._before

    def reset_in_child(self) -> None:
        """Leave the context in a forked process, which has no other threads of its parent.

        Python calls it in each child of a fork.
        """
        if self._inside:
            torch.backends.mkldnn.matmul.fp32_precision = self._before  # type: ignore[attr-defined]
        self._lock, self._inside = Lock(), 0


_setting = _Setting()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_setting.reset_in_child)


@lru_cache(1)
def uses_onednn() -> bool:
    """Return whether float32 products are sent to oneDNN: on a CPU not made by Intel, if oneDNN keeps float32 there.

    It is found out once, by the first product that asks.  The vendor decides, and not a measurement of speed, so that
    all runs on one machine round alike.  `routed_products` asks, `product` of the linear layers, and `_tiles_are_fast`
    of the kernel "sdpa".
    """
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return has_both and _cpu_vendor() != "GenuineIntel" and _is_exact()


def _cpu_vendor() -> str:
    """Return the vendor id of the CPU, or "" if the system does not name it."""
    table = Path("/proc/cpuinfo")
    if table.exists():
        vendors = [line.partition(":")[2].strip() for line in table.read_text().splitlines() if "vendor_id" in line]
        return vendors[0] if vendors else ""
    return platform.processor().rpartition(", ")[2]  # "..., AuthenticAMD"


def _is_exact() -> bool:
    """Return whether oneDNN computes a product in float32 although the setting allows bf16, from one small product.

    The answer is that of the CPU, whatever surrounds the first call: fake tensors in `longnet plan`, a transform, a
    default device or dtype, autocast.
    """
    with _disable_current_modes(), torch._C._DisableFuncTorch(), torch.autocast("cpu", enabled=False):
        generator = torch.Generator().manual_seed(0)
        a = torch.rand(256, 256, generator=generator, device="cpu", dtype=torch.float32) - 0.5
        truth = a.double() @ a.double()
        with _setting.routed():
            return bool(((a @ a) - truth).abs().max() < 1e-5 * truth.abs().max())
