"""Checks of the arguments that several layers take, and the text of a pattern for `extra_repr`."""

from __future__ import annotations

from importlib import import_module
from math import inf
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from lightning_longnet.attention.kernels import kernel_names
from lightning_longnet.attention.parallel.schedule import Exchange
from lightning_longnet.attention.pattern.ordering import Ordering
from lightning_longnet.attention.pattern.pattern import Branch, Pattern
from lightning_longnet.attention.spec import Mix

if TYPE_CHECKING:
    from torch import Tensor


def pattern_of(pattern: Pattern | dict[str, Any]) -> Pattern:
    """Return a Pattern, given one or the dictionary of `Pattern.to_dict`, as YAML files have it."""
    if isinstance(pattern, dict) and "branches" in pattern and set(pattern) <= {"branches", "multiplicity"}:
        return Pattern(**pattern)
    if not isinstance(pattern, Pattern):
        raise ValueError(f"pattern must be a Pattern, or the dictionary of Pattern.to_dict, got {pattern!r}")
    return pattern


def class_of(value: dict[str, Any]) -> type[nn.Module]:
    """Return the nn.Module class that `value["class_path"]` names, after checking "init_args"."""
    rule = 'attention must be {"class_path": "package.Name", "init_args": {...}}'
    path = value.get("class_path") if isinstance(value, dict) and set(value) <= {"class_path", "init_args"} else None
    if not isinstance(path, str) or "." not in path or not isinstance(value.get("init_args", {}), dict):
        raise ValueError(f"{rule}, got {value!r}")
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{rule}, and nothing can be imported from {path!r}: {error}") from error
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise ValueError(f"{rule} of an nn.Module, got {cls!r}")
    return cls


def positive_integer(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def positive_number(name: str, value: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < inf:
        raise ValueError(f"{name} must be a positive, finite number, got {value!r}")
    return value


def probability(name: str, value: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and less than 1, got {value!r}")
    return value


def is_readable(x: Tensor) -> bool:
    """Return whether Python can read the values of x without waiting for a device or breaking a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def require(allowed: Tensor, values: Tensor, rule: str) -> None:
    """Check that `allowed` is True everywhere.

    Where values are readable (see `is_readable`), raise a ValueError that quotes the first of `values` that is not
    allowed.  Otherwise assert on the device, which does not wait for it.
    """
    if not is_readable(values):
        torch._assert_async(allowed.all(), rule)
    elif not allowed.all():
        raise ValueError(f"{rule}, got {values[~allowed][0].item()}")


def mix_of(value: Mix) -> Mix:
    if value not in get_args(Mix):
        raise ValueError(f"mix must be one of {', '.join(map(repr, get_args(Mix)))}, got {value!r}")
    return value


def exchange_of(value: Exchange | None) -> Exchange | None:
    if value is not None and value not in get_args(Exchange):
        allowed = ", ".join(map(repr, get_args(Exchange)))
        raise ValueError(f"exchange must be one of {allowed}, or None for the strategy's, got {value!r}")
    return value


def ordering_of(value: Ordering) -> Ordering:
    if value not in get_args(Ordering):
        raise ValueError(f"ordering must be one of {', '.join(map(repr, get_args(Ordering)))}, got {value!r}")
    return value


def kernel_name(value: str) -> str:
    names = "auto", *kernel_names()
    if value not in names:
        raise ValueError(f"kernel must be one of {', '.join(map(repr, names))}, got {value!r}")
    return value


def shown_pattern(pattern: Pattern) -> str:
    """Return a pattern as text for `extra_repr`, such as `2048/1 causal + 4096/2 causal`.

    The numbers of a branch are its segment length and its dilation rate.
    """
    text = " + ".join(map(_shown_branch, pattern.branches))
    return text if pattern.multiplicity == "multiset" else f"{text} ({pattern.multiplicity})"


def _shown_branch(branch: Branch) -> str:
    words = [f"{branch.segment_length or 'all'}/{branch.dilation_rate}"]
    if branch.window is not None:
        words.append(f"window {branch.window}")
    if branch.sparsity is not None:
        words.append(str(branch.sparsity))
    if branch.is_causal:
        words.append("causal")
    if branch.head_offsets != "interleaved":
        words.append(branch.head_offsets)
    if branch.ragged != "exact":
        words.append("zero keys")
    return " ".join(words)
