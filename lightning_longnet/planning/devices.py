"""What devices can do, of their makers' data sheets."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lightning_longnet.callbacks.peak import listed, measured

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """One of the devices of a run; speeds in bytes a second, one way.

    Attributes:
        name: as its maker has it.
        memory: bytes.
        bandwidth: of its memory.
        node_link: to another of the same node.
        network: to one of another node.
        efficiency: what of the peak linear maps and attention reach.
        call_seconds: what an operator takes however small it is.
        overlaps: is what travels hidden behind what is computed?
        share: of the device, that a rank has for itself.
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

    def peak(self, dtype: torch.dtype) -> float:
        """Floating-point operations a second: listed of a GPU, measured of this machine's CPU."""
        if self.name == "cpu":
            return self.share * measured(dtype)
        found = listed(self.name, dtype, allows_tf32=False)
        if found is None:
            raise ValueError(f"device {self.name} has no listed peak in {dtype}: tell --peak-tflops")
        return found

    def shared(self, ranks: int, threads: int) -> Device:
        """As each of so many ranks of a node has it: those of a CPU share its cores."""
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


# No GPU was measured for this: shares of the peak are what others report of such kernels, to be told better by
# --efficiency, and calls are not captured in graphs
_GPU = {"efficiency": (0.6, 0.45), "call_seconds": 5e-6, "overlaps": True}
# Shares that benchmarks/planner.py found on two cores, of which others had their part, over gloo
_CPU = {"efficiency": (0.8, 0.3), "call_seconds": 2e-5, "overlaps": False}

GB = 1e9
_DEVICES = (
    # NVIDIA's data sheets of each; NVLink's bandwidth there is of both directions.  Networks are those of NVIDIA's DGX
    # B200, H200, H100 (400 Gb/s for each GPU), A100 (200 Gb/s) and V100 (four of 100 Gb/s for eight), and 100 Gb/s for
    # a card of PCIe 4.0, whose 16 lanes carry 32 GB/s
    ("B200", 180, 8000, 900, 50),
    ("GH200", 144, 4900, 450, 50),
    ("H200", 141, 4800, 450, 50),
    ("H100", 80, 3350, 450, 50),
    ("A100", 80, 2039, 300, 25),
    ("V100", 32, 900, 150, 6.25),
    ("L40S", 48, 864, 32, 12.5),
    ("A40", 48, 696, 32, 12.5),
    ("A10", 24, 600, 32, 12.5),
    ("L4", 24, 300, 32, 12.5),
    ("T4", 16, 320, 16, 12.5),
    ("RTX 4090", 24, 1008, 32, 12.5),
    ("RTX 3090", 24, 936, 32, 12.5),
)
# Of memory as small operators use it, and of gloo over the loopback, by the same benchmark
_CPU_BANDWIDTH, _LOOPBACK = 5 * GB, 1 * GB


def named(name: str) -> Device:
    """The device of that name, whatever its case; "cpu" is this machine's."""
    if name.lower() == "cpu":
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        return Device("cpu", memory, _CPU_BANDWIDTH, _LOOPBACK, _LOOPBACK, **_CPU)  # type: ignore[arg-type]
    for known, memory_gb, *speeds in _DEVICES:
        if known.lower() == name.lower().replace("_", " "):
            return Device(known, memory_gb * GB, *(each * GB for each in speeds), **_GPU)  # type: ignore[arg-type]
    names = ", ".join(["cpu", *(row[0].lower() for row in _DEVICES)])
    raise ValueError(f"device must be one of {names}, got {name!r}")
