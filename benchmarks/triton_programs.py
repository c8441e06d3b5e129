"""Compile the programs of the kernel "triton" with the tiles of its table, and print the resources that each takes.

    python benchmarks/triton_programs.py               # for a device of compute capability 9.0; needs no GPU
    python benchmarks/triton_programs.py --capability 8.0

A line of JSON for each program, width and form.  A program whose registers are spilled has `stack_bytes` above 0.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_longnet.attention.kernels.triton.arguments import Form, Lists, Rows
from lightning_longnet.attention.kernels.triton.tiles import Tile, table

if TYPE_CHECKING:
    from collections.abc import Iterator

# LongNet's rates in one launch, which writes gradients in the type of their tensors; and other properties that programs
# are compiled for
FORMS: dict[str, dict[str, Any]] = {
    "weighted, all branches": {"every": (2, 4, 8, 16), "is_joined": True, "accumulates": False},
    "all branches, padded, grouped": {
        "every": (2, 4, 8, 16),
        "is_joined": True,
        "is_padded": True,
        "group": 4,
        "accumulates": False,
    },
    "plain": {},
    "received, padded, grouped": {"every": (2, 4, 8, 16), "is_received": True, "is_padded": True, "group": 4},
}


class _Device:
    """What Triton asks of a device when it compiles, in place of a GPU."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Resources(NamedTuple):
    """What one program takes."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    wgmma: int  # the number of Hopper's matrix instructions, each for 64 rows or more
    mma: int  # of those for 16 rows
    wide_copies: int  # copies of 16 bytes from global to shared memory that nothing waits for
    narrow_offsets: int  # offsets of rows, heads and samples in a tensor that have 32 bits


@contextmanager
def device_of(capability: int) -> Iterator[None]:
    """Have Triton compile for a device of this compute capability, whether there is one or not."""
    from triton.runtime.driver import driver

    driver.set_active(_Device(capability))
    yield
    if torch.cuda.is_available():
        driver.reset_active()


def resources(program: str, width: int, tile: Tile, form: dict[str, Any], dtype: torch.dtype) -> Resources:
    """Compile a program under `device_of`, and return what it takes."""
    from lightning_longnet.attention.kernels.triton.backward import key_gradients, query_gradient
    from lightning_longnet.attention.kernels.triton.forward import forward

    def rows(like: torch.dtype, last: int) -> Rows:
        return Rows.of(torch.empty((1, 16, 8, last), dtype=like))

    numbers = torch.empty(16, dtype=torch.int32)
    lists = Lists(numbers, numbers, numbers, 8)
    padding = Rows(torch.empty((1, 16), dtype=torch.uint8), 16, 1, 0)
    inputs = [rows(dtype, width) for _ in range(3)]
    wide, statistic = rows(torch.float32, width), rows(torch.float32, 1)
    properties = {
        "group": 1,
        "every": (),
        "is_joined": False,
        "is_signed": False,
        "is_received": False,
        "is_padded": False,
        "accumulates": True,
    }
    compiled_for = Form(tile.rows, tile.others, width, width, width, width, **{**properties, **form})
    gradient = wide if compiled_for.accumulates else inputs[0]
    results: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "forward": (forward, (wide, statistic)),
        "query_gradient": (query_gradient, (inputs[0], (statistic, statistic), gradient)),
        "key_gradients": (key_gradients, (inputs[0], (statistic, statistic), (gradient, gradient))),
    }
    function, own = results[program]
    compiled = function.warmup(
        *(*inputs, *own, lists, padding, 0.125, compiled_for),
        grid=(1,),
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    code = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [_cuobjdump(), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Resources(
        int(found[1]),
        int(found[2]),
        compiled.metadata.shared,
        code.count("wgmma.mma_async"),
        code.count("mma.sync"),
        len(re.findall(r"cp\.async\.cg\.shared\.global [^\n]*0x10", code)),
        len([x for x in re.findall(r"tt\.addptr .* : (.*?)(?: loc|$)", compiled.asm["ttir"], re.M) if _is_narrow(x)]),
    )


def _is_narrow(types: str) -> bool:
    """Return whether a pointer to numbers and its offset, by their types, are 32 bits and not the column of a tile."""
    is_list, is_column = "!tt.ptr<i32>" in types, re.search(r"tensor<\d+x(?!1x)\d+xi32>$", types.strip())
    return types.strip().endswith(("i32", "i32>")) and not is_list and is_column is None


def _cuobjdump() -> str:
    """Return the program of the CUDA toolkit that Triton brings, which reads the resources out of machine code."""
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--capability", default="9.0")
    parser.add_argument("--widths", type=int, nargs="+", help="the widths of heads; by default all of the table")
    options = parser.parse_args()
    capability = int(options.capability.replace(".", ""))
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("TRITON_INTERPRET must not be set: it has Triton interpret programs instead of compiling them")
    with device_of(capability):
        for (program, width), tile in table().items():
            if options.widths is not None and width not in options.widths:
                continue
            for name, form in FORMS.items():
                found = resources(program, width, tile, form, torch.bfloat16)
                row = {"kernel": program, "width": width, "form": name, **tile._asdict(), **found._asdict()}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
