"""The trial of a kernel on a few tokens, and the memory that a call needs and a device has: what a `Guard` asks."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_longnet.attention.attend import attend, explain
from lightning_longnet.attention.kernels import reference
from lightning_longnet.attention.pattern.pattern import Pattern

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def kernel_fault(
    name: str, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, options: Mapping[str, Any]
) -> str:
    """Return why a kernel fails, or an empty text: it runs 8 tokens forward and backward, against the reference.

    The tokens run with and without padding, and with and without the dropout of `options`; what the kernel refuses is
    left out.  A `Guard` calls it before the first call of a kind, for each kernel that may run, and `longnet doctor`
    for each kernel that could serve.
    """
    small = Pattern.dilated((4, 8), (1, 2), is_causal=pattern.is_causal)
    widths = ((q.shape[2], q.shape[3]), (k.shape[2], q.shape[3]), (k.shape[2], v.shape[3]))
    with torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext():
        padding = (torch.arange(8) >= 6).to(q.device)[None]
        inputs = [_values(8, *width, place).to(q.device, dtype) for place, width in enumerate(widths)]
        grad = _values(8, q.shape[2], v.shape[3], 3).to(q.device, dtype)
        for mask, dropout in product((None, padding), {0.0, options.get("dropout", 0.0)}):
            conditions = {"key_padding_mask": mask, "dropout": dropout, "softcap": options.get("softcap")}
            if explain(inputs[0], inputs[1], inputs[2], small, kernel=name, **conditions).chosen is None:
                continue
            settings = {**conditions, "mix": options.get("mix", "exact"), "dropout_seed": 0}
            truth = _results(reference.name, [x.double() for x in inputs], small, grad.double(), settings)
            try:
                results = _results(name, inputs, small, grad, settings)
            except (RuntimeError, ImportError) as failure:
                return f"it fails on a few tokens: {failure!r}"
            allowed = torch.finfo(dtype).eps ** 0.5
            for actual, expected in zip(results, truth, strict=True):
                error = (actual.double() - expected).abs().max().item()
                if not error <= allowed * max(1.0, expected.abs().max().item()):  # NaN is no smaller than anything
                    return f"it is wrong on a few tokens, by {error:.2g}"
    return ""


def _results(
    name: str, inputs: list[Tensor], pattern: Pattern, grad: Tensor, settings: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Return out, dq, dk and dv of the kernel `name`."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out: Tensor = attend(leaves[0], leaves[1], leaves[2], pattern, kernel=name, **settings)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def _values(tokens: int, heads: int, width: int, place: int) -> Tensor:
    """Return values of one sample, (1, tokens, heads, width), the same in each process; no generator draws them.

    `place` makes those of q, k, v and the gradient different.
    """
    return torch.arange(tokens * heads * width).mul(0.7 + place).sin().view(1, tokens, heads, width)


def needed_bytes(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> int:
    """Return the least memory that a call allocates: for out and lse, and for dq, dk and dv if it needs gradients.

    A `Guard` compares it with `free_bytes` in its preflight.
    """
    out = q.shape[:3].numel() * v.shape[3]
    needed = out * dtype.itemsize + q.shape[:3].numel() * max(dtype.itemsize, 4)  # lse is at least float32
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        needed += (q.numel() + k.numel() + v.numel()) * dtype.itemsize
    return needed


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device; None where the platform does not report it.

    A `Guard` calls it in its preflight, and `longnet doctor`.  On CUDA the memory that torch has reserved and not given
    out counts as free.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    table = Path("/proc/meminfo")
    if device.type != "cpu" or not table.exists():
        return None
    rows = dict(line.split(":", 1) for line in table.read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) * 1024
