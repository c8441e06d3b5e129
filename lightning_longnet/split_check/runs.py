"""One run of a step on a copy of a module, without dropout, and with all random generators restored after it."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import keystr, tree_leaves_with_path

from lightning_longnet.sequence.batches import map_tensors
from lightning_longnet.sequence.context import SequenceContext
from lightning_longnet.split_check.engine import EngineModule
from lightning_longnet.split_check.generators import OwnGenerators, seeded
from lightning_longnet.split_check.isolation import StopStep, isolate
from lightning_longnet.split_check.outcome import BUFFER, RESULT, Outcome
from lightning_longnet.split_check.replica import Replica, Values, in_dtype
from lightning_longnet.split_check.sample import sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Step = Callable[[nn.Module, Any], Any]
    Attach = Callable[[nn.Module, SequenceContext], None]

_UPDATES = 4  # of manual optimisation that a step may make
_DROPOUTS = tuple(f"{kind}dropout{end}" for kind in ("", "alpha_", "feature_", "feature_alpha_") for end in ("", "_"))


@dataclass
class Runner:
    """Runs a step on copies of a module; `check_split` makes it, and each `Comparison` calls `run`.

    Args:
        replica: the structure of the module, or the module as FSDP2 or DeepSpeed has sharded it.
        step: called with a copy of the module and a batch; returns the loss.
        attach: gives a copy of the module its context.
        dims: the dimensions of the batch's tensors that are the sequence; see `SequenceContext.split`.
        device: the device of the run.
        training: whether there is a backward pass.
        modes: whether each module inside is in training mode, by its name.
        predicts: whether all tensors that the step returns are compared, not its loss.

    Attributes:
        drops_directly: whether a step called torch's dropout functions itself, and not by a module.
    """

    replica: Replica | EngineModule
    step: Step
    attach: Attach
    dims: Mapping[str, int | None]
    device: torch.device
    training: bool
    modes: Mapping[str, bool]
    predicts: bool = False
    drops_directly: bool = field(default=False, init=False)

    def run(
        self,
        values: Values,
        batch: Any,
        context: SequenceContext,
        seed: int = 0,
        watch: Callable[[nn.Module], Any] | None = None,
    ) -> Outcome:
        """Run the step on whole or on split sequences, by the context, and return the outcome of this rank alone.

        All ranks of the context call it together, by `Comparison._run`.  An error of the step is raised.

        Args:
            values: the values of parameters and buffers.
            batch: whole sequences; this rank gets its part of them.
            context: the context of the copy.
            seed: the seed of every generator.
            watch: called with the copy before the step; returns a context manager that the step runs in.
        """
        with self.replica.lent(values, self.modes, context) as module:
            return self._run(module, batch, context, seed, watch)

    def _run(self, module: nn.Module, batch: Any, context: SequenceContext, seed: int, watch: Any) -> Outcome:
        """Do what `run` does, on a copy of the module or the module that was lent."""
        differentiates, losses = self.training and self.replica.has_gradients, []  # type: bool, list[Tensor]

        def backward(loss: Tensor, *arguments: Any, **options: Any) -> None:
            """Keep a loss, and run its backward; a step with manual optimisation calls it as `manual_backward`."""
            losses.append(loss.detach())
            if loss.requires_grad:
                loss.backward(*arguments, **options)

        _drop_nothing(module)
        before = _floating_buffers(module)
        results: dict[str, Tensor] = {}
        gradients, generators = _Gradients(module), OwnGenerators(module)
        logged = isolate(module, backward, gradients.update, context.sequence_parallel_size)
        self.attach(module, context)
        part = context.split(sample(batch, self.dims, None), self.dims)  # a step may change its batch
        context.begin_step(0)
        with ExitStack() as stack:
            for each in (seeded(seed, self.device), self._without_dropout(), torch.compiler.set_stance("force_eager")):
                stack.enter_context(each)
            stack.enter_context(gradients.kept())
            generators.seed(seed)
            stack.enter_context(torch.set_grad_enabled(differentiates))
            if watch is not None:
                stack.enter_context(watch(module))
            try:
                result = self.step(module, part)
                results = _named_results(result) if self.predicts else {}
                loss = None if self.predicts else loss_of(result)
                if loss is not None and self.training:
                    backward(loss)
                elif loss is not None:
                    losses.append(loss)
            except StopStep:
                pass
            except Exception:  # what follows an update may need what the update is to have changed
                if not gradients.updates:
                    raise
            draws = generators.draws(self.device)
            if not self.training:  # metrics share their states by themselves
                logged.compute()
        numbers = {"the loss" if i == 0 else f"loss {i + 1}": float(x) for i, x in enumerate(losses)}
        if not self.training:
            numbers |= {f"what is logged as {name}": value for name, value in logged.items()}
        if self.replica.has_gradients:
            gradients.add()
        after = _floating_buffers(module)
        return Outcome(
            numbers,
            gradients.sums,
            results,
            {name: (value, name in logged.shared) for name, value in logged.items()} if self.training else {},
            {name: x for name, x in after.items() if name not in before or not torch.equal(x, before[name])},
            context.placement_of(context.length) if context.is_split and context.length is not None else None,
            context.sequence_parallel_rank,
            draws,
            is_reduced=isinstance(self.replica, EngineModule),
        )

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """Replace torch's dropout functions inside the block by ones that return their input.

        `eval()` would do so, too, but it also changes what BatchNorm computes.
        """
        attention: Any = torch.nn.functional.scaled_dot_product_attention

        def attend(*args: Any, dropout_p: float = 0.0, **options: Any) -> Any:
            return attention(*args[:4], 0.0, *args[5:], **options) if len(args) > 4 else attention(*args, **options)

        def dropout(x: Tensor, p: float = 0.5, train: bool = True) -> Tensor:
            self.drops_directly |= train and p > 0
            return x

        with ExitStack() as stack:
            for name in _DROPOUTS:
                for owner in (torch._VF, torch):
                    stack.enter_context(patch.object(owner, name, dropout))
            stack.enter_context(patch.object(torch.nn.functional, "scaled_dot_product_attention", attend))
            stack.enter_context(patch.object(SequenceContext, "dropout", lambda _, x, *__, **___: x))
            yield


class _Gradients:
    """The gradients that a step's updates would use, summed with other weights so that none can cancel another.

    Args:
        module: the copy of the module.

    Attributes:
        sums: the sums, by the names of the parameters.
        updates: the number of updates.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = {name: x for name, x in module.named_parameters() if x.requires_grad}
        self._is_manual = any(not getattr(each, "automatic_optimization", True) for each in module.modules())
        self._accumulated: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.updates = 0

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Record gradients as the backward leaves them, inside the block, for a step with manual optimisation.

        Before its update such a step may clip them.  Here they are one rank's, which DDP or FSDP would have averaged
        first, and the mean of clipped gradients is not the clipped mean.
        """

        def keep(name: str, x: Tensor) -> None:
            if x.grad is not None:
                self._accumulated[name] = x.grad.detach().clone()

        own = self._parameters.items() if self._is_manual else ()
        handles = [x.register_post_accumulate_grad_hook(partial(keep, name)) for name, x in own]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self) -> None:
        """Add the gradients that the parameters have now, or the recorded ones, to `sums`, weighted by the update."""
        for name, x in self._parameters.items():
            if x.grad is None and name in self.sums:
                continue
            # a rank without a gradient counts as zeros, as in DDP and FSDP
            gradient = torch.zeros_like(x) if x.grad is None else self._accumulated.get(name, x.grad)
            gradient = _local(0.7**self.updates * _dense(gradient))
            self.sums[name] = self.sums[name] + gradient if name in self.sums else gradient

    def update(self) -> None:
        """Add the gradients of an update; raise `StopStep` after `_UPDATES` of them.

        It is called in place of the optimizer's step, where the module's step calls that itself.
        """
        self.add()
        self.updates += 1
        if self.updates == _UPDATES:
            raise StopStep


def _dense(x: Tensor) -> Tensor:
    """Return a gradient, which may be sparse, as a dense tensor."""
    return x.detach().to_dense() if x.is_sparse else x.detach()


def _local(x: Tensor) -> Tensor:
    """Return the local shard of a DTensor, or the tensor itself if it is none."""
    return x.to_local() if isinstance(x, DTensor) else x


def _floating_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the buffers of floating dtypes, by the names that messages show."""
    return {
        f"{BUFFER}{name}": _local(x.detach()).clone() for name, x in module.named_buffers() if x.is_floating_point()
    }


def _named_results(result: Any) -> dict[str, Tensor]:
    """Return the tensors that a predict step returns, by names with their place in nested values."""
    leaves = tree_leaves_with_path(result)
    return {f"{RESULT}{keystr(path)}": x.detach() for path, x in leaves if isinstance(x, Tensor)}


def loss_of(result: Any) -> Tensor | None:
    """Return the loss that a step returns, alone or as "loss" of a dictionary; None if it returns none."""
    if isinstance(result, dict):
        result = result.get("loss")
    return result if isinstance(result, Tensor) and result.numel() == 1 else None


def _drop_nothing(module: nn.Module) -> None:
    """Turn dropout off in the modules of torch inside a copy, without changing their training mode."""
    for each in module.modules():
        if isinstance(each, (nn.RNNBase, nn.MultiheadAttention)):
            each.dropout = 0.0
        elif isinstance(each, nn.modules.dropout._DropoutNd):
            each.__dict__["forward"] = _same


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return x: the forward that `_drop_nothing` gives to dropout modules."""
    return x


def to_device(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Return a batch on a device, its floating tensors in a dtype; None keeps their own.  `Comparison.verdict` asks."""
    return map_tensors(batch, lambda _, x: x.to(device) if dtype is None else in_dtype(x.to(device), dtype))


def moved(batch: Any, size: float) -> Any:
    """Return a batch with random noise of about `size` times each element of its floating tensors.

    The noise is the same on all ranks.  `Comparison._noise` measures with it what rounding of the batch does.
    """
    generator = torch.Generator().manual_seed(1)

    def move(_: Any, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)
        return x * (1 + size * noise.clamp(-3, 3))

    return map_tensors(batch, move)
