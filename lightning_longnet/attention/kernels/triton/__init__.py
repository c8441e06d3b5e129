"""The kernel "triton": all branches in one launch, each distinct pair once, with rows read where they are.

    rectangles.py                         the parts of a plan as rectangles of pairs: integers
    joined.py, pieces.py, tile_list.py    which pairs a program computes, of one branch or of several
    forward.py, backward.py               the programs, which know no pattern but bands of rectangles
    launch.py                             the launches of a call
    tiles.json                            the sizes of tiles, which `benchmarks/tune_triton.py` measures

Triton is imported when the kernel runs.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from lightning_longnet.attention.kernels.compiling import constant_result

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels import Request
    from lightning_longnet.attention.kernels.accumulator import Accumulator
    from lightning_longnet.attention.kernels.blocks import BackwardInputs
    from lightning_longnet.attention.kernels.keys import Keys
    from lightning_longnet.attention.kernels.pair_options import PairOptions
    from lightning_longnet.attention.kernels.partial import Partial
    from lightning_longnet.attention.plan.parts import Parts

name = "triton"
RELEASE = (3, 6)
CAPABILITY = (8, 0)
WIDEST = 256


def note(request: Request) -> str:
    """Return what this kernel runs for a call that it does not refuse.

    `judge` asks for it, and `explain` shows it in its table of kernels.
    """
    return "few launches, rows read in place; only if named, since its speed has not been measured"


def refusals(request: Request) -> list[str]:
    """Return the reasons why this kernel cannot compute a call; an empty list if it can.

    `select` asks for a call of `attend` that may run the kernel, and `judge` for `explain`, the guard's preflight and
    `longnet plan`.
    """
    if request.device != "cuda" and not (request.device == "cpu" and _is_interpreted()):
        return [f"serves CUDA tensors, and CPU tensors under TRITON_INTERPRET=1, these are on {request.device}"]
    reasons = []
    if request.device == "cuda" and torch.version.hip is not None:
        reasons.append("serves NVIDIA's CUDA, this torch is built for ROCm")
    reasons += _missing_reasons()
    if request.capability is not None and request.capability < CAPABILITY:
        reasons.append("needs a device of compute capability {}.{}, got {}.{}".format(*CAPABILITY, *request.capability))
    if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"serves float32, bfloat16 and float16, q is {request.dtype}")
    elif request.device == "cpu" and request.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter multiplies the bits of bfloat16 as integers")
    widest = max(request.head_dim, request.value_dim)
    if widest > WIDEST:
        reasons.append(f"needs heads of {WIDEST} at most, got {widest}")
    reasons += request.lacks("has_dropout", "has_softcap", "masks_later")
    return reasons


def takes_weights(device: str) -> bool:
    """Return True: the kernel takes weights of pairs (`Block.repeats`), by which each counts several times.

    `AttentionSpec.weighted_segments` asks before a plan is made, since a plan with weights has fewer pairs.
    """
    return True


def forward_parts(
    parts: Parts,
    q: Tensor,
    keys: Keys,
    options: PairOptions,
    totals: list[Partial | None],
) -> None:
    """Merge the results of all parts into the partials of their branches; see `PartsKernel`.

    `forward_blocks` calls it once for all parts that it was given.
    """
    from lightning_longnet.attention.kernels.triton import launch

    launch.forward_parts(parts, q, keys, options, totals)


def backward_parts(
    parts: Parts,
    q: Tensor,
    keys: Keys,
    inputs: BackwardInputs,
    options: PairOptions,
    dq: Accumulator,
    stores: tuple[bool, bool] = (False, False),
) -> None:
    """Add the gradients of all parts to dq and to those of `keys`; see `PartsKernel`.

    `backward_blocks` calls it once for all parts that it was given, in place of its loop over blocks; `stores` is its
    own argument.
    """
    from lightning_longnet.attention.kernels.triton import launch

    launch.backward_parts(parts, q, keys, inputs, options, dq, stores)


def _is_interpreted() -> bool:
    """Return whether Triton interprets its programs, which it reads from the environment when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "on", "yes", "true")


@constant_result
@lru_cache(1)
def _missing_reasons() -> tuple[str, ...]:
    """Return the reasons why Triton cannot be used on this machine, without importing it."""
    if find_spec("triton") is None:
        return ("triton is not installed: pip install 'lightning-longnet[triton]'",)
    installed = version("triton")
    release = tuple(int(part) for part in installed.split(".")[:2] if part.isdecimal())
    return () if release >= RELEASE else (f"needs triton {RELEASE[0]}.{RELEASE[1]}, found {installed}",)
