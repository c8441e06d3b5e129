"""The comparison of a checkpoint with the model that is to load it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

Shape = tuple[int, ...]
ADVICE = "give the model the values that the checkpoint has, or leave ckpt_path out to begin anew"
_SHOWN = 3  # hyper-parameters that a message names
# of the configuration of a model of transformers: which class it is of, and where it was loaded from
_KIND, _PLACE = ".model_type", "._name_or_path"


def check_same_model(
    path: str | Path, saved: Mapping[str, Shape], own: Mapping[str, Shape], values: tuple[Any, Any], strict: bool = True
) -> None:
    """Raise a ValueError if the names or shapes of a checkpoint's weights are not those of the model that loads them.

    Args:
        path: the checkpoint.
        saved: the shapes of its weights, by their names.
        own: the shapes of the model's weights, by their names.
        values: (hyper-parameters of the checkpoint, of the model), from which the message explains the difference.
        strict: whether both must have the same names.
    """
    difference = _difference(saved, own, strict)
    if difference:
        raise ValueError(message_of(path, "; ".join([*_differing(*values), difference])))


def message_of(path: str | Path, difference: str) -> str:
    """Return the error message for a checkpoint of another model, on one line; `difference` says how it differs."""
    return f"ckpt_path must be a checkpoint of this model, got {path}: {difference}; {ADVICE}"


def _difference(saved: Mapping[str, Shape], own: Mapping[str, Shape], strict: bool) -> str:
    """Return the first difference between the names and shapes of weights, for the message; "" if there is none."""
    for name, shape in own.items():
        if name in saved and tuple(saved[name]) != tuple(shape):
            return f"{name} is {tuple(saved[name])} in the checkpoint and {tuple(shape)} in the model"
    missing = [name for name in own if name not in saved]
    surplus = [name for name in saved if name not in own]
    if not strict or not (missing or surplus):
        return ""
    parts = [(missing, "the checkpoint lacks"), (surplus, "the model lacks")]
    return " and ".join(
        f"{text} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "") for names, text in parts if names
    )


def _differing(saved: Any, own: Any) -> list[str]:
    """Return clauses about the hyper-parameters that differ, at most `_SHOWN`, those of a configuration first."""
    theirs, ours = dict(_flat(saved)), dict(_flat(own))
    names = [name for name in theirs if name in ours and theirs[name] != ours[name]]
    names = [name for name in names if "." in name] or names  # those of a configuration before learning rates
    names = [name for name in names if not name.endswith(_PLACE)]
    names.sort(key=lambda name: not name.endswith(_KIND))  # another kind of model explains all other differences
    return [f"the checkpoint's model has {name} {theirs[name]}, and this one {ours[name]}" for name in names[:_SHOWN]]


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, value) for the plain values of nested dictionaries, with keys such as "config.dim"."""
    if not hasattr(values, "items"):
        return
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, (bool, int, float, str)):
            yield f"{prefix}{key}", value
