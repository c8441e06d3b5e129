"""The memory, links and peaks of devices: of GPUs those of their makers' data sheets, of a CPU what is measured."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.planning.shares import Shares, measured_shares

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Link(NamedTuple):
    """The memory in GB, and speeds in GB/s, one way: of the memory, to a device of the same node, to another node."""

    memory: float
    bandwidth: float
    node_link: float
    network: float


class _Sheet(NamedTuple):
    """A row of a data sheet: dense peaks in TFLOP/s in half precision, TF32 and float32.

    A variant that differs from another row in its peaks alone has no links; plans do not name it.
    """

    name: str
    half: float
    tf32: float
    single: float
    links: _Link | None = None

    def peak(self, dtype: torch.dtype, allows_tf32: bool) -> float:
        """Return floating-point operations a second in a dtype."""
        return 1e12 * (self.half if dtype.itemsize == 2 else self.tf32 if allows_tf32 else self.single)


# A GPU is the first row whose name its own name contains.  NVLink's bandwidth in NVIDIA's sheets is of both directions.
# Networks are those of NVIDIA's DGX B200, H200, H100 (400 Gb/s for each GPU), A100 (200 Gb/s) and V100 (four of
# 100 Gb/s for eight), and 100 Gb/s for a card of PCIe 4.0, whose 16 lanes carry 32 GB/s
_SHEETS = (
    _Sheet("GB200", 2500, 1250, 80),
    _Sheet("B200", 2250, 1100, 75, _Link(180, 8000, 900, 50)),
    _Sheet("GH200", 989.4, 494.7, 67, _Link(144, 4900, 450, 50)),
    _Sheet("H200 NVL", 835.5, 417.5, 60),
    _Sheet("H200", 989.4, 494.7, 67, _Link(141, 4800, 450, 50)),
    _Sheet("H100 NVL", 835.5, 417.5, 60),
    _Sheet("H100 PCIe", 756, 378, 51),
    _Sheet("H100", 989.4, 494.7, 67, _Link(80, 3350, 450, 50)),
    _Sheet("A100", 312, 156, 19.5, _Link(80, 2039, 300, 25)),
    _Sheet("V100", 125, 15.7, 15.7, _Link(32, 900, 150, 6.25)),
    _Sheet("L40S", 362, 183, 91.6, _Link(48, 864, 32, 12.5)),
    _Sheet("A40", 149.7, 74.8, 37.4, _Link(48, 696, 32, 12.5)),
    _Sheet("A10", 125, 62.5, 31.2, _Link(24, 600, 32, 12.5)),
    _Sheet("L4", 121, 60, 30.3, _Link(24, 300, 32, 12.5)),
    _Sheet("T4", 65, 8.1, 8.1, _Link(16, 320, 16, 12.5)),
    _Sheet("RTX 4090", 165.2, 82.6, 82.6, _Link(24, 1008, 32, 12.5)),
    _Sheet("RTX 3090", 71, 35.6, 35.6, _Link(24, 936, 32, 12.5)),
)
GB = 1e9
# Of memory as small operators use it, and of gloo over the loopback, as benchmarks/planner.py measured them
_CPU_BANDWIDTH, _LOOPBACK = 5 * GB, 1 * GB
_SIZE, _TIMES = 1024, 4  # of the products that measure a CPU

# Of a GPU that `make gpu` has not measured: shares of the peak are what others report of such kernels, which
# --efficiency replaces, and calls are not captured in graphs
_ASSUMED = Shares(0.6, 0.45, 5e-6, "assumed, since make gpu has not measured this device")
# Shares that benchmarks/planner.py measured over gloo on two cores, which other processes used too
_CPU = Shares(0.8, 0.3, 2e-5, "measured on two cores that other processes used too")


@dataclass(frozen=True)
class Device:
    """A device of a run; speeds are in bytes a second, one way.

    Attributes:
        name: the maker's name.
        memory: bytes.
        bandwidth: the speed of its memory.
        node_link: the speed to another device of the same node.
        network: the speed to a device of another node.
        efficiency: the shares of the peak that linear maps and attention reach.
        call_seconds: the time of an operator, however small.
        overlaps: whether messages travel while kernels compute.
        share: the share of the device that a rank has.
        source: where `efficiency` is from.
    """

    name: str
    memory: float
    bandwidth: float
    node_link: float
    network: float
    efficiency: tuple[float, float]
    call_seconds: float
    overlaps: bool
    share: float = 1.0
    source: str = "given"

    def peak(self, dtype: torch.dtype) -> float:
        """Return floating-point operations a second: listed for a GPU, measured for this machine's CPU."""
        if self.name == "cpu":
            return self.share * measured(dtype)
        peak = listed(self.name, dtype, allows_tf32=False)
        if peak is None:
            raise ValueError(f"device {self.name} has no listed peak in {dtype}: give --peak-tflops")
        return peak

    def shared(self, ranks: int, threads: int) -> Device:
        """Return the device as each of `ranks` ranks of a node has it: those of a CPU share its cores."""
        if self.name != "cpu":
            return self
        share = min(1.0, (os.cpu_count() or 1) / (ranks * threads))
        return replace(
            self,
            memory=self.memory / ranks,
            call_seconds=self.call_seconds / share,
            bandwidth=self.bandwidth * share,
            share=share,
        )


def named(name: str) -> Device:
    """Return the device of a name, in any case and with or without spaces; "cpu" is this machine's."""
    plain = _plain(name)
    if plain == "cpu":
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        return _made("cpu", (memory, _CPU_BANDWIDTH, _LOOPBACK, _LOOPBACK), _CPU, overlaps=False)
    for sheet in _SHEETS:
        if sheet.links is not None and _plain(sheet.name) == plain:
            links, shares = [each * GB for each in sheet.links], measured_shares(sheet.name) or _ASSUMED
            return _made(sheet.name, links, shares, overlaps=True)
    names = ["cpu", *(sheet.name.lower() for sheet in _SHEETS if sheet.links is not None)]
    near = get_close_matches(plain, [_plain(each) for each in names], 3, 0.5)
    nearest = [each for each in names if _plain(each) in near]
    question = f"; the nearest are {', '.join(nearest)}" if nearest else ""
    advice = "for another device name a near one, with --memory-gib, --peak-tflops and --link-gbps"
    raise ValueError(f"device must be one of {', '.join(names)}, got {name!r}{question}; {advice}")


def _plain(name: str) -> str:
    """Return a name without its maker, spaces and dashes, in lower case."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())


def _made(name: str, links: Sequence[float], shares: Shares, overlaps: bool) -> Device:
    memory, bandwidth, node_link, network = links
    efficiency = shares.linear, shares.attention
    return Device(
        name,
        memory,
        bandwidth,
        node_link,
        network,
        efficiency,
        shares.call_seconds,
        overlaps,
        source=shares.source,
    )


def compute_dtype(precision: str) -> torch.dtype:
    """Return the dtype in which a Trainer's `precision` computes products."""
    for word, dtype in (("bf16", torch.bfloat16), ("16", torch.float16), ("64", torch.float64)):
        if word in precision:
            return dtype
    return torch.float32


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak of a device in operations a second, measured for a CPU; None where it is unknown."""
    if device.type == "cpu":
        return measured(dtype)
    if device.type == "cuda" and dtype != torch.float64:
        return listed(torch.cuda.get_device_name(device), dtype, torch.get_float32_matmul_precision() != "highest")
    return None


def listed(name: str, dtype: torch.dtype, allows_tf32: bool = False) -> float | None:
    """Return the listed peak of the GPU of a name; None where it is not listed."""
    sheet = _sheet(name)
    return None if sheet is None else sheet.peak(dtype, allows_tf32)


def sheet_name(name: str) -> str | None:
    """Return the name under which the GPU of a name is listed; None where it is not."""
    sheet = _sheet(name)
    return None if sheet is None else sheet.name


def _sheet(name: str) -> _Sheet | None:
    return next((sheet for sheet in _SHEETS if sheet.name.lower() in name.lower()), None)


def measured(dtype: torch.dtype) -> float:
    """Return the best of a few products of matrices on this process's threads, in operations a second."""
    a = torch.ones(_SIZE, _SIZE, dtype=dtype)
    out, best = torch.zeros_like(a), float("inf")
    for _ in range(_TIMES):
        begin = perf_counter()
        torch.mm(a, a, out=out)
        best = min(best, perf_counter() - begin)
    return 2 * _SIZE**3 / best
