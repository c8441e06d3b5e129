"""The place of a wrong split: the first module that gets the same inputs on parts and returns something else."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lightning_longnet.split_check.causes import ADVICE, UNKNOWN, named_causes
from lightning_longnet.split_check.outcome import whole_like
from lightning_longnet.split_check.ranks import gathered_objects, group_device
from lightning_longnet.split_check.watch import STEP, Call, Watch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lightning_longnet.attention.parallel.placement import Placement


@dataclass(frozen=True)
class Place:
    """The module in which a step begins to compute something else on parts; its text is for the message.

    Attributes:
        name: the name of a module, or that of the step.
        kind: the name of the module's class.
        causes: the likely causes, keys of `ADVICE`, the likeliest first.
    """

    name: str
    kind: str = ""
    causes: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f"{self.name} ({self.kind})" if self.kind else self.name
        lines = [f"{where} is the first that gets the same and computes something else."]
        for number, (cause, advice) in enumerate([ADVICE[name] for name in self.causes[:2]] or [UNKNOWN]):
            lines.append(f"{'Likely cause' if number == 0 else 'Or'}: {cause}.  Instead: {advice}.")
        return "\n".join(lines)


def place_of(whole: Watch, part: Watch, placement: Placement | None, rank: int, tolerance: float) -> Place | None:
    """Return the first module whose outputs differ on some rank although its inputs are the same; None if none does.

    If no module does but the step itself calls a function across tokens, it is the step.  All ranks call this together,
    and get the same; a `Comparison` does where results differ.

    Args:
        whole: the record of a step on whole sequences.
        part: the record of the step on this rank's part.
        placement: the placement of the sequences; None where the record does not say what is a sequence.
        rank: the number of this rank in it.
        tolerance: the largest relative difference that is no difference.
    """
    whole_calls, part_calls = _numbered(whole), _numbered(part)
    each = gathered_objects((list(whole_calls), list(whole_calls) == list(part_calls)))
    if not all(agreed for _, agreed in each):
        return Place("the choice of modules, which differs between parts and whole sequences,")
    # groups whose batches differ may call different modules, experts for instance
    shared = [key for key in each[0][0] if all(key in keys for keys, _ in each)]
    flags = torch.ones(len(shared), 2, dtype=torch.long)
    for i, key in enumerate(shared):
        a, b = whole_calls[key], part_calls[key]
        flags[i, 0] = _all_same(a.inputs, b.inputs, placement, rank, tolerance)
        flags[i, 1] = _all_same(a.outputs, b.outputs, placement, rank, tolerance)
    flags = flags.to(group_device())
    if dist.is_initialized():
        dist.all_reduce(flags, dist.ReduceOp.MIN)
    for key, (gets_same, returns_same) in zip(shared, flags.tolist(), strict=True):
        if gets_same and not returns_same:
            return _place(key[0], whole_calls[key].kind, part, whole)
    return _place(STEP, None, part, whole) if part.causes.get(STEP) or whole.causes.get(STEP) else None


def _numbered(watch: Watch) -> dict[tuple[str, int], Call]:
    """Return the calls of a record by (name of the module, number of its earlier calls)."""
    many: Counter[str] = Counter()
    calls = {}
    for call in watch.calls:
        calls[call.name, many[call.name]] = call
        many[call.name] += 1
    return calls


def _place(name: str, kind: type[nn.Module] | None, part: Watch, whole: Watch) -> Place:
    """Return the place of a module, with the causes that both records have for it."""
    causes = [*part.causes.get(name, []), *whole.causes.get(name, [])]
    return Place(name, "" if kind is None else kind.__name__, tuple(named_causes(kind, causes)))


def _all_same(
    whole: list[Tensor], part: list[Tensor], placement: Placement | None, rank: int, tolerance: float
) -> bool:
    """Return whether two lists have equally many tensors, and `same_tokens` holds for each pair."""
    return len(whole) == len(part) and all(
        same_tokens(a, b, placement, rank, tolerance) for a, b in zip(whole, part, strict=True)
    )


def same_tokens(whole: Tensor, part: Tensor, placement: Placement | None, rank: int, tolerance: float) -> bool:
    """Return whether `part` is this rank's tokens of `whole`, or equal to it if neither has a sequence.

    Args:
        whole: a tensor of the step on whole sequences.
        part: the same tensor of the step on this rank's part.
        placement, rank: which tokens the rank holds.
        tolerance: the largest difference that is allowed, relative to the largest element; integers must be equal.
    """
    expected = whole_like(whole, part, placement, rank)
    if expected is None or whole.dtype != part.dtype:
        return False
    whole = expected
    if not whole.is_floating_point():
        return bool((whole == part).all())
    difference = (whole - part).abs().nan_to_num(nan=0.0)
    if bool((whole.isnan() != part.isnan()).any()):
        return False
    size = whole.abs().nan_to_num(posinf=0.0).max() if whole.numel() else 0.0
    return bool((difference <= tolerance * size).all())
