"""Tensors in the form that CUDA's operators read: rows aligned to 16 bytes, and a bounded number of batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

VECTOR = 16  # bytes
# The limit of the second and third dimension of a CUDA grid; the operators put the batch in one of them
BATCHES = 2**16 - 1


def as_aligned(x: Tensor) -> Tensor:
    """Return x itself if its rows are aligned to 16 bytes, else a contiguous copy.

    Operators read misaligned rows wrongly or refuse them; the kernels of flash attention (fused.py), "cudnn" and
    torch's memory-efficient attention call it for each tensor.
    """
    width = VECTOR // x.element_size()
    is_aligned = x.data_ptr() % VECTOR == 0 and all(stride % width == 0 for stride in x.stride()[:-1])
    # clone(), since contiguous() would keep the strides of dimensions of size 1
    return x if is_aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def over_batches(
    run: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None, limit: int = BATCHES
) -> tuple[Tensor, ...]:
    """Return the results of `run(*tensors)`, called on at most `limit` batches (dim 0) at a time.

    The kernels of flash attention (fused.py), "cudnn" and torch's memory-efficient attention call their operators
    through it.  A tensor may be None, but not all.
    """
    count = next(len(x) for x in tensors if x is not None)
    if count <= limit:
        return run(*tensors)
    results = []
    for first in range(0, count, limit):
        results.append(run(*(None if x is None else x[first : first + limit] for x in tensors)))
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Return k or v with each head repeated for its query heads, (batch, heads, rows, D).

    cuDNN and memory-efficient attention need it, operators without grouped queries; x is (batch, key heads, rows, D).
    """
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def sum_groups(x: Tensor, key_heads: int) -> Tensor:
    """Return the gradient of `repeat_heads`, (batch, key heads, rows, D): the sum over each group, in float32.

    The backward of cuDNN and of memory-efficient attention calls it for dk and dv.
    """
    return x if x.shape[1] == key_heads else x.unflatten(1, (key_heads, -1)).sum(2, dtype=torch.float32)
