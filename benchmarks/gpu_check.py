"""Describe this machine's GPUs for `make gpu` as JSON, with the first reason why it cannot run.

`make gpu` runs this before anything else, in a process of its own: a driver that hangs does not hang the run.
"""

from __future__ import annotations

import json
import platform
import shutil
from importlib.util import find_spec
from typing import Any

import torch
from machine import gpu
from resumed import versions

from lightning_longnet import Pattern, explain
from lightning_longnet.attention.trial import kernel_fault

PACKAGES = ["torch", "triton", "flash-attn", "flash-attn-4", "kernels", "lightning", "pytest", "hypothesis"]
NEEDED = {"pytest": "pytest", "hypothesis": "hypothesis"}  # of the tests of exactness
CAPABILITY, FREE_GIB, GIB = (8, 0), 16, 2**30


def refusal() -> str:
    """Return the first reason why `make gpu` cannot run here, or an empty text."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; GPU_PYTHON=python3 uses the torch of another Python"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} for CUDA {torch.version.cuda} finds no device; see nvidia-smi"
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if capability < CAPABILITY:
        return "compute capability {}.{} is needed, {} has {}.{}".format(*CAPABILITY, name, *capability)
    if missing := [package for package, module in NEEDED.items() if find_spec(module) is None]:
        return f"{' and '.join(missing)} must be installed: pip install -e '.[dev]'"
    free, total = torch.cuda.mem_get_info()
    if free < FREE_GIB * GIB:
        return f"{FREE_GIB} GiB of free memory are needed, {name} has {free / GIB:.1f} of {total / GIB:.1f}"
    ones = torch.ones(256, 256, dtype=torch.bfloat16, device="cuda")
    if not bool((ones @ ones == 256).all()):
        return f"{name} computes a wrong product of matrices"
    return ""


def kernels() -> dict[str, list[str]]:
    """Return for each kernel why it does not serve bfloat16 on a GPU, tried on a few tokens; nothing where it does."""
    x = torch.zeros(1, 32, 4, 64, dtype=torch.bfloat16, device="cuda")
    pattern = Pattern.dilated((16, 32), (1, 2), is_causal=True)
    found = {}
    for verdict in explain(x, x, x, pattern).verdicts:
        reasons = list(verdict.refusals)
        if not reasons and (fault := kernel_fault(verdict.kernel, x.dtype, x, x, x, pattern, {})):
            reasons = [fault]
        found[verdict.kernel] = reasons
    return found


def described() -> dict[str, Any]:
    """Return the GPUs and versions of this machine, which results must share to belong together."""
    return gpu() | {
        "gpus": torch.cuda.device_count(),
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / GIB, 1),
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
    }


def main() -> None:
    reason = refusal()
    answer: dict[str, Any] = {"refusal": reason}
    if not reason:
        answer |= {"machine": described(), "kernels": kernels(), "sanitizer": shutil.which("compute-sanitizer")}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
