"""The versions, devices, kernels and backends of this machine, and the packages that could be added."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import lightning_longnet
from lightning_longnet.attention import Pattern, explain
from lightning_longnet.attention.trial import free_bytes, kernel_fault

_GIB = 2**30
# of each package: the extra that installs it, and what needs it
_PACKAGES = {
    "torch": ("", ""),
    "lightning": ("", ""),
    "transformers": ("hf", "tokenizers, datasets and exports of Hugging Face"),
    "deepspeed": ("deepspeed", "the strategies ring_sequence_parallel_deepspeed_stage_N"),
    "flash-attn": ("flash", "the kernel flash, on CUDA devices"),
    "triton": ("triton", "the kernel triton, on CUDA devices"),
    "matplotlib": ("plots", "pictures of patterns and plans"),
    "pillow": ("images", "ImageFolderData"),
}
_DTYPES = (torch.float32, torch.bfloat16)


class Section(NamedTuple):
    """A heading, with lines of (name, text)."""

    title: str
    rows: list[tuple[str, str]]

    def __str__(self) -> str:
        return "\n".join([self.title, *(f"  {name:<16} {text}" for name, text in self.rows)])


def examine() -> list[Section]:
    """Return the versions, devices, kernels and backends of this machine, as sections; `longnet doctor` prints them."""
    return [
        Section("versions", _versions()),
        Section("devices", [(str(device), _device(device)) for device in devices()]),
        *(Section(f"kernels of attend on {place}", _kernels(device)) for place, device in _kinds().items()),
        Section("backends between ranks", _backends()),
    ]


def devices() -> list[torch.device]:
    """Return the devices of this machine that torch can use."""
    available = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return [*available, torch.device("mps")] if torch.backends.mps.is_available() else available


def _versions() -> list[tuple[str, str]]:
    """Return (package, version) of this package, Python and the packages that it may use."""
    rows = [
        ("lightning-longnet", lightning_longnet.__version__),
        ("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
    ]
    for name, (extra, need) in _PACKAGES.items():
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, f"not installed: pip install 'lightning-longnet[{extra}]' for {need}"))
    return rows


def _device(device: torch.device) -> str:
    """Return a description of a device with its memory."""
    free = free_bytes(device)
    room = "" if free is None else f", {free / _GIB:.1f} GiB free"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{gpu.name}, {gpu.total_memory / _GIB:.1f} GiB{room}, compute capability {gpu.major}.{gpu.minor}"
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
        return f"{_processor()}, {cores} cores, {torch.get_num_threads()} threads, {whole:.1f} GiB{room}"
    return f"a device of {device.type}{room}"


def _processor() -> str:
    """Return the name of the CPU."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _kinds() -> dict[str, torch.device]:
    """Return one device of each kind, by the name of the kind: "cpu", "mps", or the model of a GPU."""
    names = {
        torch.cuda.get_device_name(each) if each.type == "cuda" else each.type: each for each in reversed(devices())
    }
    return dict(reversed(names.items()))


def _kernels(device: torch.device) -> list[tuple[str, str]]:
    """Return (kernel, text) for each kernel: which dtypes it serves on a device, tried on a few tokens, or why not."""
    pattern = Pattern.dilated((16, 32), (1, 2), is_causal=True)
    rows: dict[str, dict[str, list[str]]] = {}  # of each kernel: the types of which the same is to be said
    for dtype in _DTYPES:
        q = torch.zeros(1, 32, 4, 64, device=device, dtype=dtype)
        explanation = explain(q, q, q, pattern)
        for verdict in explanation.verdicts:
            state = f"refuses {{}}: {'; '.join(verdict.refusals)}"
            if not verdict.refusals:
                fault = kernel_fault(verdict.kernel, dtype, q, q, q, pattern, {})
                state = f"FAILS in {{}}: {fault}" if fault else "could serve {}"
                state = "runs {}" if verdict.kernel == explanation.chosen and not fault else state
            rows.setdefault(verdict.kernel, {}).setdefault(state, []).append(str(dtype).removeprefix("torch."))
    return [
        (kernel, "; ".join(state.replace("{}", ", ".join(dtypes)) for state, dtypes in states.items()))
        for kernel, states in rows.items()
    ]


def _backends() -> list[tuple[str, str]]:
    """Return (backend, text) for gloo and NCCL: whether ranks can use it here, or why not."""
    if not dist.is_available():
        return [("none", "this torch is built without torch.distributed: ranks cannot share sequences")]
    nccl = "available"
    if not dist.is_nccl_available():
        nccl = "this torch is built without it: install a torch with CUDA, where there are GPUs of NVIDIA"
    elif not torch.cuda.is_available():
        nccl = "no use: torch finds no CUDA device"
    gloo = (
        "available"
        if dist.is_gloo_available()
        else "this torch is built without it: ranks on CPUs cannot share sequences"
    )
    return [("gloo", gloo), ("nccl", nccl)]
