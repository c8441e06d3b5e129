"""The units of work of `make gpu`, in their order: what is right first, then how fast it is."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).resolve().parent
LENGTHS = (2**16, 2**18, 2**20, 2**22)
DENSE_LENGTHS = (2**14, 2**16)
HEAD_DIMS = (64, 128)
# kernels that are one operator of dense attention, too
DENSE_OPS = ("sdpa", "cudnn", "flash", "hub", "flash3", "flash4")
SCHEME_OPS = ("sdpa", "cudnn", "flash3", "flash4")  # those that torchscale's scheme is measured on
TRAINED = (2**16, 2**17, 2**18, 2**19, 2**20)
ANCESTOR_LENGTHS = (4096, 8192)


class Unit(NamedTuple):
    """One process of a run.

    Attributes:
        name: its key in the record.
        kind: "exactness", "exchange", "sanitizer", "attention", "dense", "ancestor", "step" or "shares".
        command: what it runs; a measurement prints its result as JSON in the last line.
        least: the seconds that must be left of a call to begin it.
        timeout: seconds after which it is given up.
        needs: the units that must have passed.
    """

    name: str
    kind: str
    command: tuple[str, ...]
    least: float = 30.0
    timeout: float = 500.0
    needs: tuple[str, ...] = ()


def units(answer: dict[str, Any]) -> list[Unit]:
    """Return the units for a machine, as `gpu_check.py` describes it."""
    serving = [name for name, refusals in answer["kernels"].items() if not refusals]
    return [
        *_exactness(serving),
        *_exchanges(answer["machine"]["gpus"]),
        *_sanitizer(answer["sanitizer"], serving),
        *_attention(serving),
        *_steps(),
        Unit("shares of the peak", "shares", _program("gpu_shares.py")),
    ]


def _program(name: str, *words: object) -> tuple[str, ...]:
    return (sys.executable, str(FOLDER / name), *map(str, words))


def _exactness(serving: list[str]) -> Iterator[Unit]:
    """Yield the tests of each kernel, and those that concern none."""
    for kernel in (*serving, "none"):
        words = "-m", "gpu", "--kernel", kernel, "-q", "-p", "no:cacheprovider", str(FOLDER.parent / "tests/gpu")
        yield Unit(_exact(kernel), "exactness", (sys.executable, "-m", "pytest", *words), least=120)


def _exact(kernel: str) -> str:
    return f"exactness, {kernel}"


def _exchanges(gpus: int) -> Iterator[Unit]:
    """Yield the comparison of all exchanges over NCCL with one process, on two GPUs and on all."""
    for ranks in sorted({2, gpus} if gpus > 1 else ()):
        words = "-m", "lightning_longnet", "doctor", "--backend", "nccl", "--timeout", "300", "--ranks", str(ranks)
        yield Unit(f"exchanges over NCCL, {ranks} ranks", "exchange", (sys.executable, *words), least=90)


def _sanitizer(tool: str | None, serving: list[str]) -> Iterator[Unit]:
    if tool is None:
        return
    for kernel in serving:
        words = ["--participant", kernel, "--tokens", "1024", "--segments", "256,512"]
        words += ["--rounds", "1", "--yardstick", "0"]
        command = (tool, "--tool", "memcheck", "--error-exitcode", "1", *_program("gpu_attention.py", *words))
        yield Unit(f"compute-sanitizer, {kernel}", "sanitizer", command, least=120, needs=(_exact(kernel),))


def _attention(serving: list[str]) -> Iterator[Unit]:
    """Yield attention at each length, so that the first lengths are there for every kernel when a run is stopped."""
    kernels = [name for name in serving if name not in ("eager", "reference")]
    participants = [*kernels, *(f"scheme {op}" for op in SCHEME_OPS if op in serving)]
    dense = [f"dense {op}" for op in DENSE_OPS if op in serving]
    for tokens, head_dim, participant in product(DENSE_LENGTHS, HEAD_DIMS, dense):
        yield _measured("dense", participant, tokens, head_dim)
    for tokens, head_dim, participant in product(LENGTHS, HEAD_DIMS, participants):
        yield _measured("attention", participant, tokens, head_dim)
    for tokens, dtype, kernel in product(ANCESTOR_LENGTHS, ("float16", "float32"), ("auto",)):
        yield _measured("ancestor", kernel, tokens, 64, dtype)


def _measured(kind: str, participant: str, tokens: int, head_dim: int, dtype: str = "bfloat16") -> Unit:
    words = "--participant", participant, "--tokens", tokens, "--head-dim", head_dim, "--dtype", dtype
    name = f"{kind}, {participant}, {tokens:,} tokens, heads of {head_dim}, {dtype}"
    kernel = participant.split()[-1]
    needs = () if kernel == "auto" or participant != kernel else (_exact(kernel),)
    return Unit(name, kind, _program("gpu_attention.py", *words), needs=needs)


def _steps() -> Iterator[Unit]:
    for tokens in TRAINED:
        yield Unit(f"step of 125M, {tokens:,} tokens", "step", _program("gpu_step.py", "--tokens", tokens), least=60)
