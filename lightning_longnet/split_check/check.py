"""`check_split`: runs a step on whole sequences and on parts, and compares the loss and every gradient."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist

from lightning_longnet.sequence.attach import hand_down
from lightning_longnet.sequence.batches import checked_dims
from lightning_longnet.sequence.context import SequenceContext
from lightning_longnet.split_check.locate import Place, place_of
from lightning_longnet.split_check.replica import Replica, perturbed
from lightning_longnet.split_check.runs import GRADIENT, Outcome, Runner, moved, to_device
from lightning_longnet.split_check.sample import batch_length, sample, sample_lengths, whole_batch
from lightning_longnet.split_check.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from lightning_longnet.split_check.replica import Values
    from lightning_longnet.split_check.runs import Attach

Action = Literal["error", "warn", "off"]
Kind = Literal["equal", "different", "inconclusive", "not checked"]

_PERTURBATION = 0.1  # of each parameter: a gate that begins at zero would hide what is behind it
_NOISE = 10.0  # how many times the difference of two equal computations in another order is allowed
_COPIES = 6  # of all parameters, which the check holds at its peak
_MEMORY_SHARE = 0.25
_WITHOUT_A_PLACE = {
    "gradient": "\nAll modules compute the same, and so the backward pass differs.  Likely cause: a collective without "
    "a gradient, or a detached tensor.  Instead: use gather_sequence(x) or sum_parts(x) of sequence_context(self).",
    "number": "\nAll modules compute the same, and so the step makes another loss of it.  Likely cause: a sum over the "
    "tokens of this rank, where engines average over ranks.  Instead: return "
    "sequence_context(self).token_mean(loss_sum, token_count).",
}


class SplitMismatch(RuntimeError):  # noqa: N818  the name says what happened
    """A step computes something else on parts of sequences than on whole ones."""


@dataclass(frozen=True)
class Verdict:
    """The result of a split check.

    Attributes:
        kind: "equal", "different", "inconclusive" where the step is random, or "not checked".
        message: one line for "equal" and "not checked"; else what differs, where, and what to do.
        error: the largest relative difference of the loss or of a gradient; None where nothing was compared.
        place: where it begins, for "different".
    """

    kind: Kind
    message: str
    error: float | None = None
    place: Place | None = None


def check_split(
    module: nn.Module,
    step: Callable[[nn.Module, Any], Any],
    batch: Any,
    context: SequenceContext,
    *,
    sequence_dims: Mapping[str, int | None] | None = None,
    action: Action = "error",
    training: bool = True,
    replica: Replica | None = None,
    attach: Attach = hand_down,
) -> Verdict:
    """Compare a step on parts of sequences with the same step on whole ones, in the loss and in every gradient.

    All ranks call this together, before the first step.  The step runs on copies of the module, in float64 where it
    can, on a short piece of the batch whose length is odd; dropout is off.  Module, batch and generators stay as they
    are.  It takes about as long as a few steps on short sequences.

    Args:
        module: the module, before an engine wraps or shards it.
        step: called as `step(copy, batch)`; returns the loss, or a dictionary that holds "loss".
        batch: whole sequences, or a `SequencePart`.
        context: the context of this rank.
        sequence_dims: the dimensions of the batch's tensors that are the sequence; see `SequenceContext.split`.
        action: "error" raises a `SplitMismatch` on all ranks where the results differ, "warn" warns on rank 0; "off"
            checks nothing.
        training: whether there is a backward pass; else the numbers that the step returns and logs are compared.
        replica: the structure of the module, taken before it was sharded; by default it is taken now.
        attach: gives a copy its context; `hand_down` by default.

    Returns:
        The verdict, the same on all ranks.
    """
    check_action(action)
    if action == "off":
        return Verdict("not checked", "split_check is 'off'")
    if context.sequence_parallel_size == 1:
        return Verdict("not checked", "sequences are whole on every rank")
    verdict = _verdict(module, step, batch, context, checked_dims(sequence_dims or {}), training, replica, attach)
    if verdict.kind == "different" and action == "error":
        raise SplitMismatch(verdict.message)
    if verdict.kind in ("different", "inconclusive") and _is_first():
        warnings.warn(verdict.message, stacklevel=2)
    return verdict


def check_action(action: Any) -> None:
    """Raise a ValueError where an action of the split check is none of those that there are."""
    if action not in get_args(Action):
        raise ValueError(f"split_check must be one of {', '.join(map(repr, get_args(Action)))}, got {action!r}")


def _verdict(
    module: nn.Module,
    step: Any,
    batch: Any,
    context: SequenceContext,
    dims: dict[str, int | None],
    training: bool,
    replica: Replica | None,
    attach: Attach,
) -> Verdict:
    device = _device(module, context)
    fault = ""
    if replica is None:
        try:
            replica = Replica(module)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:  # what copies of attributes raise
            fault = f"the module cannot be copied: {error}"
    if fault := _first_fault(fault):
        return Verdict("not checked", fault)
    assert replica is not None
    dtypes = _dtypes(replica, device)
    if not dtypes:
        return Verdict("not checked", "a rank has not the memory for copies of the whole module")
    modes = {name: each.training for name, each in module.named_modules()}
    runner = Runner(replica, step, attach, dims, device, training, modes)
    batch = whole_batch(batch, dims, context)
    fault = "the batch is too short"
    for tokens in _lengths(batch, dims, context, replica):
        for dtype in dtypes:
            check = _Check(runner, replica.values_of(module, dtype, device), dtype, context, tokens)
            try:
                check.cut(batch)
                whole, fault = check.attempt(check.whole)
                if fault:
                    continue  # the step may mix dtypes, which only its own fits
                part, fault = check.attempt(check.parts)
                if fault:
                    break  # its parts may have to be of a certain length
                assert whole is not None
                assert part is not None
                return check.compared(whole, part)
            finally:
                check.close()
    return Verdict("not checked", f"the step does not run on a copy of the module: {fault}")


def _device(module: nn.Module, context: SequenceContext) -> torch.device:
    """Return the device of the ranks, which the parameters need not be on."""
    if context.mesh is not None and context.mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return next((x.device for x in module.parameters()), torch.device("cpu"))


def _lengths(
    batch: Any, dims: Mapping[str, int | None], context: SequenceContext, replica: Replica
) -> list[int | None]:
    """Return the lengths to try, the same on all ranks; None stands for batches whose sequences the model makes."""
    length = batch_length(batch, dims)
    if length is None:
        return [None]
    shortest = torch.tensor(length, device=_group_device())
    if dist.is_initialized():
        dist.all_reduce(shortest, dist.ReduceOp.MIN)
    return [*sample_lengths(int(shortest), context.sequence_parallel_size, replica.sizes)]


def _dtypes(replica: Replica, device: torch.device) -> list[torch.dtype | None]:
    """Return the dtypes to try, the most exact that fits into memory first; None stands for the module's own."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks
    fitting = torch.tensor(_MEMORY_SHARE * free / max(1, replica.numbers) / _COPIES, device=_group_device())
    if dist.is_initialized():
        dist.all_reduce(fitting, dist.ReduceOp.MIN)
    if fitting < 4:
        return []
    return [torch.float64, torch.float32, None] if fitting >= 8 else [torch.float32, None]


class _Check:
    """The runs of a check at one length and in one dtype."""

    def __init__(
        self,
        runner: Runner,
        values: Values,
        dtype: torch.dtype | None,
        context: SequenceContext,
        tokens: int | None,
    ) -> None:
        self.runner, self.dtype, self.tokens, self.context = runner, dtype, tokens, context
        self.values = perturbed(values, _PERTURBATION, seed=0)
        self.own_group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self.own_group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        self.batch: Any = None

    def close(self) -> None:
        """Destroy the group of this rank alone."""
        if self.own_group is not None:
            dist.destroy_process_group(self.own_group)

    def cut(self, batch: Any) -> None:
        """Cut the batch to the length of this check."""
        self.batch = to_device(sample(batch, self.runner.dims, self.tokens), self.runner.device, self.dtype)

    def whole_context(self) -> SequenceContext:
        """Return a context in which this rank computes whole sequences."""
        position = replace(
            self.context.position, sequence_parallel_size=1, sequence_parallel_rank=0, sequence_group=self.own_group
        )
        return SequenceContext(position=position, seed=self.context.seed)

    def part_context(self) -> SequenceContext:
        """Return a context like the run's own, so that this one keeps its batch."""
        context = self.context
        return SequenceContext(
            placement=context.placement, exchange=context.exchange, seed=context.seed, position=context.position
        )

    def whole(self, seed: int = 0, watch: Any = None) -> Outcome:
        """Return the outcome of whole sequences."""
        return self.runner.run(self.values, self.batch, self.whole_context(), seed, watch)

    def parts(self) -> Outcome:
        """Return the outcome of this rank's part."""
        return self.runner.run(self.values, self.batch, self.part_context())

    def noise(self, whole: Outcome) -> float:
        """Return how much rounding moves the outcome: by how much it changes where all inputs change by an ulp."""
        dtypes = {x.dtype for x in self.values.values() if x.is_floating_point()} or {torch.float32}
        # a step may compute some of it in float32
        ulp = max(torch.finfo(dtype).eps for dtype in {*dtypes, torch.float32})
        other = self.runner.run(
            perturbed(self.values, ulp, seed=1), moved(self.batch, ulp), self.whole_context(), 0, None
        )
        return max(ulp, whole.difference(other)[0])

    def attempt(self, run: Callable[[], Outcome]) -> tuple[Outcome | None, str]:
        """Return the outcome of a run, or on all ranks the error that it raised on one of them."""
        outcome, fault = None, ""
        try:
            outcome = run()
        except Exception as error:  # noqa: BLE001  a step may raise anything at a length or dtype that it is not made for
            fault = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        return outcome, _first_fault(fault)

    def compared(self, whole: Outcome, part: Outcome) -> Verdict:
        """Return the verdict on two outcomes, which all ranks know alike."""
        if not whole.numbers and not any(gradient.any() for gradient in whole.gradients.values()):
            return Verdict("not checked", "the step returns and logs no number")
        if not all(abs(value) < float("inf") for value in whole.numbers.values()):
            return Verdict("not checked", "the loss of whole sequences is not finite")
        noise = _from_first(self.noise(whole))
        error, what = _from_first(whole.difference(part))
        ranks, size = self.context.sequence_parallel_size, "" if self.tokens is None else f" at {self.tokens} tokens"
        if error <= _NOISE * noise:
            message = f"checked{size}: {ranks} ranks equal one process, to {max(error, 1e-16):.0e}"
            return Verdict("equal", message, error)
        shown = f"{what} on {ranks} ranks differs by {error:.1%} from that of one process"
        seeds = _from_first(whole.difference(self.whole(seed=1))[0])
        place = self._place(_NOISE * noise)
        where = "" if place is None else f"\n{place}"
        if seeds > _NOISE * noise:
            message = f"the split check is inconclusive, as the step draws random numbers: {shown}.{where}"
            return Verdict("inconclusive", message, error, place)
        if place is None:
            where = _WITHOUT_A_PLACE["gradient" if what.startswith(GRADIENT) else "number"]
        message = (
            f"the module computes something else on parts of sequences than on whole ones: {shown}.{where}\n"
            f"docs/modules.md shows what is safe.  split_check='warn' goes on, 'off' does not look."
        )
        return Verdict("different", message, error, place)

    def _place(self, tolerance: float) -> Place | None:
        context, rank = self.part_context(), self.context.sequence_parallel_rank
        here = None if self.tokens is None else context.placement_of(self.tokens).lengths[rank]
        whole, part = Watch(self.tokens), Watch(here)
        self.whole(watch=whole.watching)
        self.runner.run(self.values, self.batch, context, 0, part.watching)
        placement = None if context.length is None else context.placement_of(context.length)
        place: Place | None = _from_first(place_of(whole, part, placement, rank, tolerance))
        return place


def _first_fault(fault: str) -> str:
    """Return on all ranks the fault of the first of them that has one."""
    if not dist.is_initialized():
        return fault
    faults: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    return next((each for each in faults if each), "")


def _from_first(value: Any) -> Any:
    """Return the value of rank 0 on all ranks: what is decided by it is decided alike."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _group_device() -> torch.device:
    is_nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda" if is_nccl else "cpu")
