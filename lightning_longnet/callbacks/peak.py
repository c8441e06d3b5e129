"""What a device can do at its best, in floating-point operations a second."""

from __future__ import annotations

from time import perf_counter

import torch

# Dense peaks of the makers' data sheets, in TFLOP/s, by what the device's name holds; the first that fits is taken.
# Of float32 that of TF32 products, which count where torch allows them, and that of the plain units
_TERAFLOPS: tuple[tuple[str, float, float, float], ...] = (
    # half, TF32, float32
    ("GB200", 2500, 1250, 80),
    ("B200", 2250, 1100, 75),
    ("H200 NVL", 835.5, 417.5, 60),
    ("H200", 989.4, 494.7, 67),
    ("GH200", 989.4, 494.7, 67),
    ("H100 NVL", 835.5, 417.5, 60),
    ("H100 PCIe", 756, 378, 51),
    ("H100", 989.4, 494.7, 67),
    ("A100", 312, 156, 19.5),
    ("A40", 149.7, 74.8, 37.4),
    ("A10", 125, 62.5, 31.2),
    ("L40S", 362, 183, 91.6),
    ("L4", 121, 60, 30.3),
    ("V100", 125, 15.7, 15.7),
    ("T4", 65, 8.1, 8.1),
    ("RTX 4090", 165.2, 82.6, 82.6),
    ("RTX 3090", 71, 35.6, 35.6),
)
_SIZE, _TIMES = 1024, 4


def compute_dtype(precision: str) -> torch.dtype:
    """Of a Trainer's `precision`: what products are computed in."""
    for word, dtype in (("bf16", torch.bfloat16), ("16", torch.float16), ("64", torch.float64)):
        if word in precision:
            return dtype
    return torch.float32


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Of one device; of a CPU what a product of matrices reaches here and now.  None where nothing is known."""
    if device.type == "cpu":
        return measured(dtype)
    if device.type == "cuda" and dtype != torch.float64:
        return listed(torch.cuda.get_device_name(device), dtype, torch.get_float32_matmul_precision() != "highest")
    return None


def listed(name: str, dtype: torch.dtype, allows_tf32: bool = False) -> float | None:
    for word, half, tf32, single in _TERAFLOPS:
        if word.lower() in name.lower():
            return 1e12 * (half if dtype.itemsize == 2 else tf32 if allows_tf32 else single)
    return None


def measured(dtype: torch.dtype) -> float:
    """Of this process, with its threads, while its neighbours do what they do."""
    a = torch.ones(_SIZE, _SIZE, dtype=dtype)
    out, best = torch.zeros_like(a), float("inf")
    for _ in range(_TIMES):
        begin = perf_counter()
        torch.mm(a, a, out=out)
        best = min(best, perf_counter() - begin)
    return 2 * _SIZE**3 / best
