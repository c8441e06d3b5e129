"""One run of a step on a replica: its loss and gradients, without dropout, and with every generator restored."""

from __future__ import annotations

import random
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_longnet.sequence.batches import mapped
from lightning_longnet.split_check.replica import Replica, StopStep, Values, in_dtype, isolate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from lightning_longnet.sequence.context import SequenceContext

    Step = Callable[[nn.Module, Any], Any]
    Attach = Callable[[nn.Module, SequenceContext], None]

_DROPOUTS = tuple(f"{kind}dropout{end}" for kind in ("", "alpha_", "feature_", "feature_alpha_") for end in ("", "_"))

GRADIENT = "the gradient of"


@dataclass
class Outcome:
    """The results of a step, averaged over all ranks as engines average gradients.

    Attributes:
        numbers: the loss, and in validation the numbers that were logged.
        gradients: the gradient of each parameter that has one.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def difference(self, other: Outcome) -> tuple[float, str]:
        """Return the largest relative difference of another outcome from this one, and what differs by that."""
        worst = 0.0, "the loss"
        for name in {**self.numbers, **other.numbers}:
            a, b = self.numbers.get(name, 0.0), other.numbers.get(name, 0.0)
            worst = max(worst, (_relative(abs(a - b), abs(a)), name))
        norms = {name: float(gradient.norm()) for name, gradient in self.gradients.items()}
        largest = max(norms.values(), default=0.0)
        for name in {**self.gradients, **other.gradients}:
            whole, part = self.gradients.get(name), other.gradients.get(name)
            moved = part if whole is None else whole if part is None else whole - part
            assert moved is not None
            # a gradient that is nothing but rounding is measured by the others
            size = _relative(float(moved.norm()), norms.get(name, 0.0) + 1e-4 * largest)
            worst = max(worst, (size, f"{GRADIENT} {name}"))
        return worst


def _relative(difference: float, size: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / size if size > 0.0 and difference == difference else float("inf")


@dataclass
class Runner:
    """Runs a step on copies of a module.

    Args:
        replica: the structure of the module.
        step: called with a copy of the module and a batch; returns the loss.
        attach: gives a copy of the module its context.
        dims: the dimensions of the batch's tensors that are the sequence; see `SequenceContext.split`.
        device: the device of the run.
        training: whether there is a backward pass.
        modes: whether each module inside is in training mode, by its name.
    """

    replica: Replica
    step: Step
    attach: Attach
    dims: Mapping[str, int | None]
    device: torch.device
    training: bool
    modes: Mapping[str, bool]

    def run(
        self,
        values: Values,
        batch: Any,
        context: SequenceContext,
        seed: int = 0,
        watch: Callable[[nn.Module], Any] | None = None,
    ) -> Outcome:
        """Return the outcome of the step on whole sequences, or on parts, as the context has it.

        Args:
            values: the values of parameters and buffers.
            batch: whole sequences; this rank gets its part of them.
            context: the context of the copy.
            seed: the seed of every generator.
            watch: called with the copy before the step; returns a context manager that the step runs in.
        """
        losses: list[Tensor] = []

        def backward(loss: Tensor) -> None:
            losses.append(loss.detach())
            if loss.requires_grad:
                loss.backward()

        module = self.replica.module_with(values, self.modes)
        _drop_nothing(module)
        logged = isolate(module, backward)
        self.attach(module, context)
        part = context.split(batch, self.dims)
        context.begin_step(0)
        with ExitStack() as stack:
            for each in (seeded(seed, self.device), without_dropout(), torch.compiler.set_stance("force_eager")):
                stack.enter_context(each)
            stack.enter_context(torch.set_grad_enabled(self.training))
            if watch is not None:
                stack.enter_context(watch(module))
            try:
                loss = loss_of(self.step(module, part))
                if loss is not None and self.training:
                    backward(loss)
                elif loss is not None:
                    losses.append(loss)
            except StopStep:
                pass
        numbers = {"the loss" if i == 0 else f"loss {i + 1}": float(x) for i, x in enumerate(losses)}
        if not self.training:
            numbers |= {f"what is logged as {name}": value for name, value in logged.items()}
        return _averaged(numbers, module)


def loss_of(result: Any) -> Tensor | None:
    """Return the loss in what a step returns."""
    if isinstance(result, dict):
        result = result.get("loss")
    return result if isinstance(result, Tensor) and result.numel() == 1 else None


def _averaged(numbers: dict[str, float], module: nn.Module) -> Outcome:
    """Return numbers and gradients averaged over all ranks."""
    gradients = {}
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        # a rank without a gradient counts as zeros, as in engines
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().to_dense()
        if ranks > 1:
            dist.all_reduce(gradient)
            gradient = gradient / ranks
        gradients[name] = gradient
    shared = dict(numbers)
    if ranks > 1 and numbers:
        values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=_device(module))
        dist.all_reduce(values)
        shared = dict(zip(numbers, (values / ranks).tolist(), strict=True))
    return Outcome(shared, gradients)


def _device(module: nn.Module) -> torch.device:
    return next((x.device for x in module.parameters()), torch.device("cpu"))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch inside the block, and restore them after it."""
    numpy: Any = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        torch.manual_seed(seed)
        if numpy is not None:
            numpy.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            if numpy is not None:
                numpy.random.set_state(states[1])


@contextmanager
def without_dropout() -> Iterator[None]:
    """Let torch's dropout functions return their input inside the block.

    `eval()` would do so, too, but it also changes what BatchNorm computes.
    """
    attention: Any = torch.nn.functional.scaled_dot_product_attention

    def attend(*args: Any, dropout_p: float = 0.0, **options: Any) -> Any:
        return attention(*args[:4], 0.0, *args[5:], **options) if len(args) > 4 else attention(*args, **options)

    with ExitStack() as stack:
        for name in _DROPOUTS:
            for owner in (torch._VF, torch):
                stack.enter_context(patch.object(owner, name, lambda x, *_, **__: x))
        stack.enter_context(patch.object(torch.nn.functional, "scaled_dot_product_attention", attend))
        yield


def _drop_nothing(module: nn.Module) -> None:
    for each in module.modules():
        if isinstance(each, (nn.RNNBase, nn.MultiheadAttention)):
            each.dropout = 0.0


def to_device(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Return a batch on a device, its floating tensors in a dtype."""
    return mapped(batch, lambda _, x: x.to(device) if dtype is None else in_dtype(x.to(device), dtype))


def moved(batch: Any, size: float) -> Any:
    """Return a batch whose floating tensors differ by `size` of themselves, the same on all ranks."""
    generator = torch.Generator().manual_seed(1)

    def move(_: Any, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)
        return x * (1 + size * noise.clamp(-3, 3))

    return mapped(batch, move)
