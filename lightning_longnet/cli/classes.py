"""Classes by their paths, and the nearest of them to a path that leads to none."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy

import lightning_longnet

if TYPE_CHECKING:
    from collections.abc import Iterator

_BASES = (L.LightningModule, L.LightningDataModule, Callback, Strategy, Logger)


def class_of(path: str, base: type) -> Any:
    """Return the class of a path, or of the name of a subclass of `base` that is loaded.

    Raise a ValueError where there is none, with the reason and the nearest.  A function that makes such objects serves
    as well.
    """
    module, _, name = path.rpartition(".")
    if not module:
        named_class = next((each for each in subclasses(base) if each.__name__ == name), None)
        if named_class is None:
            raise ValueError(f"model must be the path of a class, got {path!r}{nearest_class(path)}")
        return named_class
    try:
        value: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model must be the path of a class, got {path!r}: {error}{nearest_class(path)}") from None
    if isinstance(value, type) and not issubclass(value, base):
        raise ValueError(f"model must be the path of a {base.__name__}, got {path!r}, which is none")
    return value


def nearest_class(path: str) -> str:
    """Return the question whether the nearest class was meant: of its module, of those that are loaded, or of ours."""
    module, _, name = path.rpartition(".")
    loaded: dict[str, str] = {
        each.__name__: f"{each.__module__}.{each.__name__}" for base in _BASES for each in subclasses(base)
    }
    try:
        names = [each for each in dir(import_module(module)) if not each.startswith("_")] if module else []
    except ImportError:
        names = []
    if near := get_close_matches(name, names, 1):
        return f"; did you mean {module}.{near[0]}?"
    paths = {each: f"lightning_longnet.{each}" for each in lightning_longnet.__all__}
    paths |= {each: loaded[each] if module else each for each in loaded}  # which short names lead to
    near = get_close_matches(name, paths, 1)
    return f"; did you mean {paths[near[0]]}?" if near else ""


def subclasses(base: type) -> Iterator[type]:
    """Yield all classes below `base` that are loaded."""
    each: type
    for each in type.__subclasses__(base):
        yield each
        yield from subclasses(each)
