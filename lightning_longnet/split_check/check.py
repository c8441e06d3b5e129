"""`check_split`: runs a step on whole sequences and on parts, and compares the loss and every gradient."""

from __future__ import annotations

import os
import warnings
from contextlib import closing, contextmanager
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist

from lightning_longnet.sequence.attach import attach_context
from lightning_longnet.sequence.batches import checked_dims, named_tensors
from lightning_longnet.split_check.comparison import Comparison
from lightning_longnet.split_check.engine import EngineModule
from lightning_longnet.split_check.ranks import first_fault, group_device, is_first
from lightning_longnet.split_check.refusals import Refusal
from lightning_longnet.split_check.replica import Replica
from lightning_longnet.split_check.runs import Runner
from lightning_longnet.split_check.sample import aligned_length, batch_length, sample_lengths, whole_batch
from lightning_longnet.split_check.verdict import DROPOUT, Verdict, inconclusive, not_checked, side_effect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

    from lightning_longnet.sequence.context import SequenceContext
    from lightning_longnet.split_check.runs import Attach

Action = Literal["error", "warn", "off"]

_COPIES = 8  # of all parameters, which the check holds at its peak
_MEMORY_SHARE = 0.25


class SplitMismatch(RuntimeError):  # noqa: N818  the name says what happened
    """The error that `check_split` raises on all ranks if a step computes something else on split sequences."""


def check_split(
    module: nn.Module,
    step: Callable[[nn.Module, Any], Any],
    batch: Any,
    context: SequenceContext,
    *,
    sequence_dims: Mapping[str, int | None] | None = None,
    action: Action = "error",
    training: bool = True,
    predicts: bool = False,
    replica: Replica | str | None = None,
    attach: Attach = attach_context,
    inside: EngineModule | None = None,
) -> Verdict:
    """Compare a step on parts of sequences with the same step on whole ones, in the loss and in every gradient.

    `RingSequenceParallelStrategy` calls it with the first batch of each loop; a training loop without the strategy may
    call it before the first step.  All ranks call it together.  The step runs on copies of the module, in float64
    where it can, on a short piece of the batch whose length is odd; dropout is off.  Module, batch and generators stay
    as they are.  It takes about as long as a few steps on short sequences.

    Args:
        module: the module, before DDP, FSDP or DeepSpeed wraps or shards it.
        step: called as `step(copy, batch)`; returns the loss, or a dictionary that holds "loss".
        batch: whole sequences, or a `SequencePart`.
        context: the context of this rank.
        sequence_dims: the dimensions of the batch's tensors that are the sequence; see `SequenceContext.split`.
        action: "error" raises a `SplitMismatch` on all ranks where the results differ, and a ValueError where this
            package refuses the parts of sequences that the step gives it; "warn" warns on rank 0; "off" checks nothing.
        training: whether there is a backward pass; else the numbers that the step returns and logs are compared.
        predicts: whether all tensors that the step returns are compared; without `training`.
        replica: the structure of the module, taken before it was sharded, or why it cannot be; by default it is taken
            now.
        attach: gives a copy its context; `attach_context` by default.
        inside: the module as FSDP2 or DeepSpeed has sharded it, in which the step runs if the module cannot be copied
            whole; such a check finds less.

    Returns:
        The verdict, the same on all ranks.
    """
    check_action(action)
    if action == "off":
        return not_checked("split_check is 'off'")
    if context.sequence_parallel_size == 1:
        return not_checked("sequences are whole on every rank")
    dims = checked_dims(sequence_dims or {})
    with _gradients_kept(module):
        runner, dtypes, fault = _copies(module, step, context, dims, training, replica, attach)
        runner = replace(runner, predicts=predicts)
        if fault and inside is not None:
            runner, dtypes = replace(runner, replica=inside, step=inside.step), [None]
            verdict = _of_engine(_verdict(runner, module, dtypes, batch, context), fault)
        else:
            verdict = not_checked(fault) if fault else _verdict(runner, module, dtypes, batch, context)
    if verdict.kind == "different" and action == "error":
        raise SplitMismatch(verdict.message)
    if verdict.refusal and action == "error":
        raise ValueError(verdict.refusal)
    if verdict.kind in ("different", "inconclusive") and is_first():
        warnings.warn(verdict.message, stacklevel=2)
    if is_first():
        for what, error in verdict.side_effects.items():
            warnings.warn(side_effect(context.sequence_parallel_size, error, what, module), stacklevel=2)
    if verdict.drops_directly and is_first():
        warnings.warn(DROPOUT, stacklevel=2)
    return verdict


def check_action(action: Any) -> None:
    """Raise a ValueError if an argument `action` of `check_split`, or `split_check` of the strategy, is wrong.

    `check_split` calls it, and `check_options` when a strategy is made.
    """
    if action not in get_args(Action):
        raise ValueError(f"split_check must be one of {', '.join(map(repr, get_args(Action)))}, got {action!r}")


@contextmanager
def _gradients_kept(module: nn.Module) -> Iterator[None]:
    """Restore the gradients of a module's parameters after the block.

    The step runs on a copy, but may reach the parameters of the module by an object that both share.
    """
    kept = [(parameter, parameter.grad) for parameter in module.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def replica_of(module: nn.Module, whole: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Replica | str:
    """Return the structure of a module, for copies that `check_split` fills with values, or why it cannot be copied.

    The strategy's `FirstBatchCheck` calls it at set-up, before FSDP2 or DeepSpeed shards the module, and `check_split`
    where it is given no structure.

    Args:
        module: the module, whole on this rank.
        whole: returns the full tensor of a parameter that is sharded later; see `Replica`.
    """
    try:
        return Replica(module) if whole is None else Replica(module, whole)
    except Exception as error:  # noqa: BLE001  attributes of users' classes are copied by their own methods
        return f"the module cannot be copied: {error}"


def _copies(
    module: nn.Module,
    step: Any,
    context: SequenceContext,
    dims: dict[str, int | None],
    training: bool,
    replica: Replica | str | None,
    attach: Attach,
) -> tuple[Runner, list[torch.dtype | None], str]:
    """Return (what runs a step on copies of the module, the dtypes to try, why there can be no copies, or "").

    All ranks call it together, and get the same reason.  The arguments are those of `check_split`.
    """
    device = _device(module, context)
    replica = replica_of(module) if replica is None else replica
    modes = {name: each.training for name, each in module.named_modules()}
    runner = Runner(replica, step, attach, dims, device, training, modes)  # type: ignore[arg-type]  # replaced below
    if fault := first_fault(replica if isinstance(replica, str) else ""):
        return runner, [], fault
    assert isinstance(replica, Replica)
    dtypes = _dtypes(replica, device)
    return runner, dtypes, "" if dtypes else "a rank has not the memory for copies of the whole module"


def _of_engine(verdict: Verdict, fault: str) -> Verdict:
    """Return a verdict whose message also says that the step ran in the sharded module, and why: `fault`."""
    if verdict.kind == "not checked":
        return replace(verdict, message=f"{fault}, and inside of the engine {verdict.message}")
    weaker = f"This check ran inside of the engine, and finds less than one on copies, as {fault}."
    return replace(verdict, message=f"{verdict.message}{'.  ' if verdict.kind == 'equal' else chr(10)}{weaker}")


def _verdict(
    runner: Runner, module: nn.Module, dtypes: list[torch.dtype | None], batch: Any, context: SequenceContext
) -> Verdict:
    """Return the verdict at the first length and in the first dtype in which the step gives results.

    A difference, or a side effect, at a short length is confirmed at an aligned one; see `aligned_length`.

    Args:
        runner: runs the step on copies, or in the sharded module.
        module: the module, whose parameters have the values.
        dtypes: the dtypes to try, in this order.
        batch, context: those of `check_split`.
    """
    replica, dims = runner.replica, runner.dims
    batch = whole_batch(batch, dims, context)
    length, fault, refusal = _length(batch, dims), "the batch is too short", Refusal()
    ranks = context.sequence_parallel_size
    lengths = [None] if length is None else sample_lengths(length, ranks, replica.sizes)
    for tokens in lengths:
        for dtype in dtypes:
            values = replica.values_of(module, dtype, runner.device)
            with closing(Comparison(runner, values, dtype, context, tokens, length)) as comparison:
                # labels that the batch lacks may make up for the tokens by which parts differ, and hide a plain mean
                verdict, fault = comparison.verdict(batch, fewer_labels=True)
                if fault and length is not None:
                    verdict, fault = comparison.verdict(batch)
            if verdict is not None:
                aligned = None if length is None else aligned_length(length, ranks)
                has_error = verdict.error is not None and isfinite(verdict.error)
                if verdict.side_effects and aligned not in (None, tokens):
                    with closing(Comparison(runner, values, dtype, context, aligned, length)) as comparison:
                        verdict = _with_lasting_effects(verdict, comparison, batch)
                if verdict.kind != "different" or not has_error or aligned in (None, tokens):
                    return replace(verdict, drops_directly=runner.drops_directly)
                with closing(Comparison(runner, values, dtype, context, aligned, length)) as comparison:
                    return _confirmed(verdict, comparison, batch, tokens)
            refusal = comparison.refusal
            if tokens != length and refusal.is_of_positions and _has_positions(batch):
                # a document may begin where a part of the piece does, and not where one of the batch does
                refusal = Refusal()
            if comparison.ran_whole:
                break  # its parts may have to be of a certain length
    where = "there" if isinstance(replica, EngineModule) else "on copies of the module"
    return not_checked(f"the step gives no result {where}: {fault}", refusal.text)


def _has_positions(batch: Any) -> bool:
    """Return whether a batch has positions, which may restart in packed documents."""
    return any(path[-1] in ("position_ids", "positions") for path, _ in named_tensors(batch))


def _verdict_at(comparison: Comparison, batch: Any) -> Verdict | None:
    """Return the verdict of a comparison, with unequal numbers of labels on the ranks if the step allows it.

    It is None if the step raised an error.
    """
    verdict, fault = comparison.verdict(batch, fewer_labels=True)
    return comparison.verdict(batch)[0] if fault else verdict


def _confirmed(verdict: Verdict, comparison: Comparison, batch: Any, tokens: int | None) -> Verdict:
    """Return a verdict of "different", or one of "inconclusive" if parts do not differ at an aligned length.

    There all ranks hold equally many tokens, as in the real batch: a convolution with a stride, blocks or a plain mean
    may need that.  They hold unequal numbers of labels, as any batch may.

    Args:
        verdict: the verdict at the short length, "different".
        comparison: the comparison at the aligned length.
        batch: whole sequences.
        tokens: the short length.
    """
    other = _verdict_at(comparison, batch)
    if other is None or other.kind != "equal":
        return verdict
    assert verdict.error is not None
    what = f"at {tokens} tokens, which ranks hold unequal parts of, the result"
    reason = (
        f"parts give what whole sequences give at {comparison.tokens} tokens, of which each rank holds as many, not "
        f"at other lengths.  It is right only while no batch has such a length"
    )
    return inconclusive(reason, comparison.ranks, verdict.error, what, verdict.place)


def _with_lasting_effects(verdict: Verdict, comparison: Comparison, batch: Any) -> Verdict:
    """Return a verdict without the side effects that are not there in a comparison at an aligned length."""
    other = _verdict_at(comparison, batch)
    if other is None or other.kind != "equal":
        return verdict
    return replace(verdict, side_effects={x: n for x, n in verdict.side_effects.items() if x in other.side_effects})


def _device(module: nn.Module, context: SequenceContext) -> torch.device:
    """Return the device on which this rank computes; the parameters may be on another one still."""
    if context.mesh is not None and context.mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return next((x.device for x in module.parameters()), torch.device("cpu"))


def _length(batch: Any, dims: Mapping[str, int | None]) -> int | None:
    """Return the smallest number of tokens N of all ranks' batches, which call it together.

    It is None if the model makes the sequences.
    """
    length = batch_length(batch, dims)
    if length is None:
        return None
    shortest = torch.tensor(length, device=group_device())
    if dist.is_initialized():
        dist.all_reduce(shortest, dist.ReduceOp.MIN)
    return int(shortest)


def _dtypes(replica: Replica, device: torch.device) -> list[torch.dtype | None]:
    """Return the dtypes to try, the most exact that fits into the memory of all ranks first; they call it together.

    None stands for the module's own dtypes; the list is empty if not even float32 fits.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks
    fitting = torch.tensor(_MEMORY_SHARE * free / max(1, replica.numbers) / _COPIES, device=group_device())
    if dist.is_initialized():
        dist.all_reduce(fitting, dist.ReduceOp.MIN)
    if fitting < 4:
        return []
    return [torch.float64, torch.float32, None] if fitting >= 8 else [torch.float32, None]
