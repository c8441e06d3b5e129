"""The programs of the kernel "triton", compiled for a Hopper GPU: matrix instructions, and no spilled registers."""

import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from lightning_longnet.attention.kernels.triton.tiles import table, tile_of

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
PROGRAMS = ("forward", "query_gradient", "key_gradients")


def run(name, *arguments, cache, packages=()):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache)}
    environment |= {"PYTHONPATH": os.pathsep.join([*map(str, packages), str(BENCHMARKS.parent)])}
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)


WIDTHS = sorted({width for _, width in table()})


# Triton 3.6 belongs to the oldest torch that is supported
@pytest.fixture(
    scope="module",
    params=[
        ("installed", [64]),
        pytest.param(("installed", WIDTHS), marks=pytest.mark.full),
        pytest.param(("3.6.0", WIDTHS), marks=pytest.mark.full),
    ],
    ids=lambda param: f"{param[0]}-{len(param[1])}",
)
def compiles(request):
    """The version of Triton that compiles, and the widths of heads."""
    return request.param


@pytest.fixture(scope="module")
def compiled(compiles, tmp_path_factory):
    """The resources of each program of these widths, in each form."""
    (triton, widths), packages = compiles, []
    if triton != "installed":
        packages.append(tmp_path_factory.mktemp("packages"))
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages[0], f"triton=={triton}"]
        subprocess.run(pip, check=True, timeout=1200)
    words = "--widths", *map(str, widths)
    result = run("triton_programs.py", *words, cache=tmp_path_factory.mktemp("cache"), packages=packages)
    for package in packages:  # 600 MB
        shutil.rmtree(package)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.long
def test_no_program_of_the_table_spills_registers(compiles, compiled):
    assert {(row["kernel"], row["width"]) for row in compiled} == set(product(PROGRAMS, compiles[1]))
    assert [row for row in compiled if row["stack_bytes"] > 0] == []
    assert max(row["shared_bytes"] for row in compiled) <= 227 * 1024


@pytest.mark.long
def test_products_run_on_the_matrix_units_of_a_hopper_gpu(compiled):
    for row in compiled:
        # 64 keys of heads of 256, with both of their gradients, do not fit the registers of a program
        is_wide = (row["kernel"], row["width"]) == ("key_gradients", 256)
        assert (row["wgmma"] > 0, row["mma"] > 0) == (not is_wide, is_wide), row


@pytest.mark.long
def test_offsets_have_64_bits(compiled):
    assert [row for row in compiled if row["narrow_offsets"] > 0] == []


@pytest.mark.long
def test_rows_are_copied_in_pieces_of_16_bytes_while_others_are_computed(compiled):
    assert [row for row in compiled if not row["wide_copies"]] == []


@pytest.mark.long
def test_tiles_are_tuned_on_a_gpu_alone(tmp_path):
    result = run("tune_triton.py", cache=tmp_path)
    assert result.returncode == 1
    assert result.stderr == "tune_triton.py: torch finds no CUDA device here, and tiles are measured on one\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_width_of_heads_has_a_tile(program):
    for width in (1, 32, 64, 80, 128, 200, 256):
        tile = tile_of(program, width, 2)
        assert tile == table()[program, 64 if width <= 64 else 128 if width <= 128 else 256]
        wide = tile_of(program, width, 4)
        assert wide.rows == tile.rows
        assert wide.others * 4 <= max(64, tile.others * 2)
