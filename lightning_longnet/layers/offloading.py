"""Tensors that are saved for the backward, kept in the memory of the host until then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Stored:
    """A copy in the memory of the host, and the device that it came from."""

    copy: Any
    device: torch.device


def store(x: Tensor) -> Stored:
    """Return a copy in the memory of the host, pinned where x is on a CUDA device.

    The copy is made in the order of the current stream, and the caller does not wait for it.
    """
    copy = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
    copy.copy_(x.detach(), non_blocking=x.is_cuda)
    return Stored(copy, x.device)


def load(stored: Stored) -> Tensor:
    """Return the tensor on its device again; on a CPU it is the copy itself."""
    copy: Tensor = stored.copy
    return copy.to(stored.device, non_blocking=True)


def saved_on_host() -> saved_tensors_hooks:
    """Return a context in which all tensors that are saved for the backward are kept on the host."""
    return saved_tensors_hooks(lambda x: store(x), lambda stored: load(stored))


def input_on_host(checkpointed: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function like torch's `checkpoint`, which keeps the first argument of its function on the host.

    Args:
        checkpointed: `checkpoint` with its options, called with a function and its arguments.
    """

    def call(function: Callable[..., Any], x: Tensor, *arguments: Any) -> Any:
        address, shape = x.data_ptr(), x.shape  # not x itself: autograd keeps `pack` as long as what it packed

        def pack(saved: Tensor) -> Any:
            return store(saved) if saved.data_ptr() == address and saved.shape == shape else saved

        with saved_tensors_hooks(pack, lambda kept: load(kept) if isinstance(kept, Stored) else kept):
            return checkpointed(function, x, *arguments)

    return call
