"""The description of the machine and versions of a result, measurements of memory and speed, and the command line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from lightning_longnet.attention.kernels.products import routed_products

if TYPE_CHECKING:
    from collections.abc import Callable


def described(device: str) -> dict[str, Any]:
    found = gpu() if device == "cuda" else cpu()
    return found | {
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def gpu() -> dict[str, Any]:
    driver = "unknown"
    if (program := shutil.which("nvidia-smi")) is not None:  # containers may lack it
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def cpu() -> dict[str, Any]:
    model = platform.processor() or "unknown"
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        model = f"{fields.get('model name')}, family {fields.get('cpu family')}, model {fields.get('model')}"
    a, out = torch.randn(2048, 2048), torch.empty(2048, 2048)

    def gflops() -> float:
        times = []
        for _ in range(9):
            begin = perf_counter()
            torch.mm(a, a, out=out)
            times.append(perf_counter() - begin)
        return round(2 * 2048**3 / statistics.median(times) / 1e9, 1)

    stock = gflops()
    with routed_products():
        routed = gflops()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "product_gflops": {"stock": stock, "routed": routed},
    }


def allocated(call: Callable[[], Any], device: torch.device | None = None) -> int:
    """Return the peak memory of a call in torch's allocator in bytes, without what was allocated before."""
    if device is not None and device.type == "cuda":
        call()  # so that buffers which are kept between calls do not count
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    held = most = 0
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def run(
    documentation: str | None,
    result: Path,
    measured: Callable[[int], Any],
    table: Callable[[Any], str],
    rounds: int,
) -> None:
    """Measure, write the result and print its table; with `--table` print that of the committed result alone."""
    parser = argparse.ArgumentParser(description=(documentation or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--table", action="store_true", help="print the committed result")
    arguments = parser.parse_args()
    if not arguments.table:
        result.write_text(json.dumps(measured(arguments.rounds), indent=1) + "\n")
    print(table(json.loads(result.read_text())))
