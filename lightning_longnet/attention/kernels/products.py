"""Where a CPU's matrix products are computed."""

from __future__ import annotations

import platform
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def routed_products() -> Iterator[None]:
    """float32 products by oneDNN, where MKL is slow and oneDNN still computes in float32.

    MKL runs at half speed or less on some CPUs that are not its maker's; on its maker's it is the faster one.  Asking
    for bf16 products sends them to oneDNN, which rounds only where the CPU has tiles for it; there the setting stays as
    it was.  While it is set, torch refuses to tell its float32 precision to other threads.
    """
    if not _is_routed():
        yield
        return
    with _setting.routed():
        yield


class _Setting:
    """One for all threads: the first one in remembers what the user chose, the last one out puts it back."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = Lock(), 0, "none"

    @contextmanager
    def routed(self) -> Iterator[None]:
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
                if self._inside == 0:
                    products.fp32_precision = self._before


_setting = _Setting()


@lru_cache(1)
def _is_routed() -> bool:
    """By who made the CPU and not by the clock, so that all runs on a machine round alike."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return has_both and _maker() != "GenuineIntel" and _is_exact()


def _maker() -> str:
    table = Path("/proc/cpuinfo")
    if table.exists():
        found = [line.partition(":")[2].strip() for line in table.read_text().splitlines() if "vendor_id" in line]
        return found[0] if found else ""
    return platform.processor().rpartition(", ")[2]  # "..., AuthenticAMD"


def _is_exact() -> bool:
    a = torch.rand(256, 256, generator=torch.Generator().manual_seed(0)) - 0.5
    truth = a.double() @ a.double()
    with _setting.routed():
        return bool(((a @ a) - truth).abs().max() < 1e-5 * truth.abs().max())
