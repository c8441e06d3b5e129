"""The outcome of a step: its losses, its gradients, and which random numbers it drew."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite, sqrt

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_longnet.split_check.ranks import gathered_objects, group_device

GRADIENT = "the gradient of"


@dataclass
class Outcome:
    """The results of a step.

    Attributes:
        numbers: the loss, and in validation the numbers that were logged.
        gradients: the gradient of each parameter that has one.
        draws: a number that two runs share which drew equally many random numbers.
        is_reduced: whether an engine has averaged the gradients, of which each rank may hold a part.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    draws: int = 0
    is_reduced: bool = False

    def averaged(self) -> Outcome:
        """Return the outcome averaged over all ranks, as engines average gradients; all ranks call this together."""
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if ranks == 1:
            return self
        gradients = dict(self.gradients) if self.is_reduced else {}
        for name, gradient in () if self.is_reduced else self.gradients.items():
            total = gradient.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(total)
            gradients[name] = total / ranks
        # a rank may have none of the numbers that others have
        each = gathered_objects(self.numbers)
        names = list(dict.fromkeys(name for numbers in each for name in numbers))
        numbers = {name: sum(numbers.get(name, 0.0) for numbers in each) / ranks for name in names}
        return Outcome(numbers, gradients, self.draws, self.is_reduced)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compare; all ranks ask together, as they do for `is_finite`."""
        norms = [self._norm(gradient) for gradient in self.gradients.values()]
        return not self.numbers and not any(norms)

    @property
    def is_finite(self) -> bool:
        """Whether all numbers and gradients are finite."""
        norms = [self._norm(gradient) for gradient in self.gradients.values()]
        return all(map(isfinite, [*self.numbers.values(), *norms]))

    def drew_like(self, other: Outcome) -> bool:
        """Whether on all ranks two runs drew equally many random numbers; all ranks call this together."""
        same = torch.tensor(int(self.draws == other.draws), device=group_device())
        if dist.is_initialized():
            dist.all_reduce(same, dist.ReduceOp.MIN)
        return bool(same)

    def _norm(self, gradient: Tensor) -> float:
        """Return the norm of a gradient, of which the ranks may hold a part each; then all call this together."""
        if not self.is_reduced or not dist.is_initialized():
            return float(gradient.norm())
        square = gradient.to(group_device()).double().square().sum()
        dist.all_reduce(square)
        return sqrt(float(square))

    def difference(self, other: Outcome) -> tuple[float, str]:
        """Return the largest relative difference of another outcome from this one, and what differs by that."""
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
        return worst


def _relative(difference: float, size: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / size if size > 0.0 and difference == difference else float("inf")
