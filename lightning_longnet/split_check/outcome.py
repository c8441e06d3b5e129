"""The outcome of a step: its losses, its gradients, what it returns and logs, and the buffers that it changes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import isfinite, isnan, sqrt
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_longnet.sequence.buckets import in_buckets
from lightning_longnet.sequence.parts import part_of
from lightning_longnet.split_check.ranks import gathered_objects, group_device

if TYPE_CHECKING:
    from lightning_longnet.attention.parallel.placement import Placement

GRADIENT = "the gradient of"
BUFFER = "the buffer "
RESULT = "what predict_step returns"


@dataclass
class Outcome:
    """The results of one run of a step on this rank, which `Runner.run` returns.

    A `Comparison` averages each over all ranks, and compares those of whole sequences with others by the methods, on
    all ranks together.

    Attributes:
        numbers: the loss, and in validation the numbers that were logged.
        gradients: the gradient of each parameter that has one.
        results: the tensors that a predict step returns, on this rank, by their names.
        logged: in training, each number that was logged, and whether ranks are to reduce it; else rank 0 logs its own.
        buffers: the floating buffers that the step changed, on this rank, by their names.
        placement: the placement of the sequences of which this rank has a part; None for whole sequences.
        rank: the rank among those that share a sequence.
        draws: a number that two runs share which drew equally many random numbers.
        is_reduced: whether FSDP2 or DeepSpeed has averaged the gradients, of which each rank may hold a part.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    results: dict[str, Tensor] = field(default_factory=dict)
    logged: dict[str, tuple[float, bool]] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    placement: Placement | None = None
    rank: int = 0
    draws: int = 0
    is_reduced: bool = False

    def averaged(self) -> Outcome:
        """Return the outcome averaged over all ranks, as DDP averages gradients; all ranks call this together."""
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if ranks == 1:
            return self
        gradients = self.gradients
        if not self.is_reduced:
            gradients = {name: x.clone(memory_format=torch.contiguous_format) for name, x in gradients.items()}
            in_buckets(dist.all_reduce, gradients.values())
            for total in gradients.values():
                total /= ranks
        # a rank may have none of the numbers that others have
        each = gathered_objects(self.numbers)
        names = list(dict.fromkeys(name for numbers in each for name in numbers))
        numbers = {name: sum(numbers.get(name, 0.0) for numbers in each) / ranks for name in names}
        every = gathered_objects(self.logged)
        logged = dict(every[0])
        for name, (_, is_shared) in every[0].items():
            if is_shared:
                logged[name] = sum(each.get(name, (0.0, True))[0] for each in every) / ranks, True
        return replace(self, numbers=numbers, gradients=gradients, logged=logged)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compare; all ranks read it together, as `is_finite`."""
        norms = [self._norm(gradient) for gradient in self.gradients.values()]
        return not self.numbers and not any(norms) and not any(gathered_objects(bool(self.results)))

    @property
    def is_finite(self) -> bool:
        """Whether all numbers and gradients are finite, for an averaged outcome; all ranks read it together."""
        norms = [self._norm(gradient) for gradient in self.gradients.values()]
        return all(map(isfinite, [*self.numbers.values(), *norms]))

    def drew_like(self, other: Outcome) -> bool:
        """Return whether on all ranks two runs drew equally many random numbers; all ranks call this together."""
        same = torch.tensor(int(self.draws == other.draws), device=group_device())
        if dist.is_initialized():
            dist.all_reduce(same, dist.ReduceOp.MIN)
        return bool(same)

    def _norm(self, gradient: Tensor) -> float:
        """Return the norm of a gradient; all ranks call this together, as each may hold a shard of it."""
        if not self.is_reduced or not dist.is_initialized():
            return float(gradient.norm())
        square = gradient.to(group_device()).double().square().sum()
        dist.all_reduce(square)
        return sqrt(float(square))

    def difference(self, other: Outcome) -> tuple[float, str]:
        """Return (largest relative difference, what differs by it) of the outcome of parts, `other`, from this one.

        The loss and logged numbers, the gradients, and the results of a predict step are compared.  All ranks call this
        together.
        """
        worst = 0.0, "the loss"
        for name in {**self.numbers, **other.numbers}:
            a, b = self.numbers.get(name, 0.0), other.numbers.get(name, 0.0)
            worst = max(worst, (_relative(abs(a - b), abs(a)), name))
        norms = {name: self._norm(gradient) for name, gradient in self.gradients.items()}
        largest = max(norms.values(), default=0.0)
        for name in {**self.gradients, **other.gradients}:
            whole, part = self.gradients.get(name), other.gradients.get(name)
            moved = part if whole is None else whole if part is None else whole - part
            assert moved is not None
            # a gradient that is nothing but rounding is measured by the others
            size = _relative(self._norm(moved), norms.get(name, 0.0) + 1e-4 * largest)
            worst = max(worst, (size, f"{GRADIENT} {name}"))
        if any(gathered_objects(bool(self.results))):
            results = self._moved(self.results, other.results, other)
            worst = max(
                worst, *((size, name) for each in gathered_objects(results) for name, size in each.items()), worst
            )
        return worst

    def has_comparable_results(self, other: Outcome) -> bool:
        """Return whether on some rank `other` has results of comparable shapes; all ranks call this together."""
        return any(gathered_objects(bool(self._moved(self.results, other.results, other))))

    def side_effects(self, other: Outcome) -> dict[str, float]:
        """Return how much what another outcome logged, and the buffers that it changed, differ from those of this one.

        The names say what differs.  All ranks call this together, and get the same.
        """
        moved = self._moved(self.buffers, other.buffers, other)
        for name in self.logged.keys() & other.logged.keys():
            a, b = self.logged[name][0], other.logged[name][0]
            if a != b and not (isnan(a) and isnan(b)):
                moved[f"what is logged as {name}"] = _relative(abs(a - b), abs(a))
        every = gathered_objects(moved)
        return {
            name: max(each.get(name, 0.0) for each in every) for name in sorted({x for each in every for x in each})
        }

    def _moved(self, whole: dict[str, Tensor], part: dict[str, Tensor], other: Outcome) -> dict[str, float]:
        """Return the relative difference of each tensor on this rank that both have in comparable shapes.

        Args:
            whole, part: tensors of this outcome and of the outcome of parts, by name.
            other: the outcome of parts, with its placement and rank.
        """
        sizes = {}
        for name in whole.keys() & part.keys():
            expected = whole_like(whole[name], part[name], other.placement, other.rank)
            if expected is not None:
                sizes[name] = _tensors_differ(expected, part[name])
        return sizes


def whole_like(whole: Tensor, part: Tensor, placement: Placement | None, rank: int) -> Tensor | None:
    """Return what `part` must be equal to: this rank's tokens of `whole`, or all of it if the shapes are equal.

    None if the shape of `part` is neither.  The dimension of the tokens is found by its size; (B, N) may be flattened
    into one dimension.  `Outcome` asks for results and buffers, and `same_tokens` of locate.py for those of modules.
    """
    if whole.shape == part.shape:
        return whole
    if placement is None or whole.dim() != part.dim():
        return None
    changed = [dim for dim in range(whole.dim()) if whole.shape[dim] != part.shape[dim]]
    dim, tokens, here = changed[0], placement.length, placement.lengths[rank]
    if len(changed) > 1 or whole.shape[dim] % tokens or part.shape[dim] * tokens != whole.shape[dim] * here:
        return None
    # (rows, tokens) may have been flattened
    rows = whole.shape[dim] // tokens
    return part_of(whole.unflatten(dim, (rows, tokens)), placement, rank, dim + 1).flatten(dim, dim + 1)


def _tensors_differ(whole: Tensor, part: Tensor) -> float:
    """Return the largest difference relative to the largest element; for integers, the share of those that differ."""
    if not whole.numel():
        return 0.0
    if not (whole.is_floating_point() or whole.is_complex()):
        return float((whole != part).double().mean())
    same = (whole == part) | (whole.isnan() & part.isnan())  # infinities are equal, and their difference is no number
    differences = (whole - part).abs().masked_fill(same, 0.0)
    size = whole.abs().nan_to_num(nan=0.0, posinf=0.0).max()
    return _relative(float(differences.max()), float(size))


def _relative(difference: float, size: float) -> float:
    """Return `difference / size`; 0 if both are 0, and infinity for NaN or if only the size is 0."""
    if difference == 0.0:
        return 0.0
    return difference / size if size > 0.0 and difference == difference else float("inf")
