"""Parameter groups with and without weight decay, and a learning rate schedule of warm-up and cosine."""

from __future__ import annotations

from math import cos, pi
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_longnet.layers.options import positive_integer

if TYPE_CHECKING:
    from torch.optim import Optimizer

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters of a module as two groups for an optimiser: with weight decay and without.

    The weights of linear maps, convolutions and embeddings decay, and those of experts, which transformers names
    `..._proj`.  Biases, norms and parameters that belong to no such layer (tables of positions, class tokens) do not.
    A group without parameters is left out.

    Args:
        module: the module.  A parameter that it holds under two names is listed once.
        weight_decay: weight decay of the first group; that of the second is 0.

    >>> [len(group["params"]) for group in decay_groups(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), 0.1)]
    [1, 3]
    """
    if not isinstance(weight_decay, (int, float)) or not weight_decay >= 0:
        raise ValueError(f"weight_decay must be a number, at least 0, got {weight_decay!r}")
    decaying: dict[nn.Parameter, None] = {}
    others: dict[nn.Parameter, None] = {}
    for each in module.modules():
        for name, parameter in each.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in decaying and parameter not in others:
                multiplies = (
                    name.endswith(("weight", "_proj")) and not isinstance(each, _NORMS) and _is_matrix(parameter)
                )
                (decaying if multiplies else others)[parameter] = None
    groups = [
        {"params": list(decaying), "weight_decay": float(weight_decay)},
        {"params": list(others), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Return whether a parameter has several dimensions, unlike the weight of a norm of another class than torch's."""
    return len(getattr(parameter, "ds_shape", parameter.shape)) > 1  # DeepSpeed may hold a part, of one dimension


def warmup_cosine(optimizer: Optimizer, steps: int, warmup_steps: int, final_share: float = 0.1) -> LambdaLR:
    """Return a scheduler that raises the learning rate linearly over `warmup_steps`, then lowers it as half a cosine.

    Step 0 has `1 / warmup_steps` of the highest rate, step `warmup_steps - 1` the highest rate, and step `steps - 1`
    and all later ones have `final_share` of it.

    Args:
        optimizer: the optimiser; its learning rates are the highest ones.
        steps: number of optimiser steps of the whole run.
        warmup_steps: less than `steps`; with 0 the schedule begins at the highest rate.
        final_share: the last rate, as a share of the highest.
    """
    positive_integer("steps", steps)
    if not isinstance(warmup_steps, int) or isinstance(warmup_steps, bool) or not 0 <= warmup_steps < steps:
        raise ValueError(f"warmup_steps must be from 0 to {steps - 1}, fewer than steps, got {warmup_steps!r}")
    if not isinstance(final_share, (int, float)) or not 0 <= final_share <= 1:
        raise ValueError(f"final_share must be from 0 to 1, got {final_share!r}")

    def share(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        begin = max(warmup_steps - 1, 0)
        progress = min((step - begin) / max(steps - 1 - begin, 1), 1.0)
        return final_share + (1 - final_share) * (1 + cos(pi * progress)) / 2

    return LambdaLR(optimizer, share)
