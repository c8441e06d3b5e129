"""What a run left in its folder, read as far as it goes."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Sequence

RECORD = "run.json"
METRICS = "metrics.csv"
_CONFIGS = ("config.yaml", "hparams.yaml")

Points = list[tuple[float, float]]


@dataclass
class Run:
    """A name, and what is known: series over steps by key, settings by their path, and the record of `RunReport`."""

    name: str
    folder: Path
    series: dict[str, Points] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    def points(self, *keys: str) -> Points:
        """Of the first of these that was logged."""
        return next((self.series[key] for key in keys if self.series.get(key)), [])

    def last(self, *keys: str) -> float | None:
        """What was logged last, or what the record has."""
        found = self.points(*keys)
        if found:
            return found[-1][1]
        final = self.record.get("final", {})
        return next((final[key] for key in keys if key in final), None)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Whatever a tag makes of a value, the value itself is read."""


def _plain(loader: yaml.SafeLoader, _: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    assert isinstance(node, yaml.ScalarNode)
    return loader.construct_scalar(node)


_Loader.add_multi_constructor("", _plain)


def read_runs(run_dirs: Sequence[str | Path]) -> list[Run]:
    """Each by a name that tells it from the others."""
    if not run_dirs:
        raise ValueError("run_dirs must name at least one folder of a run, got none")
    folders = [_folder_of(Path(each)) for each in run_dirs]
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _folder_of(given: Path) -> Path:
    """The folder itself, or its last version, as Lightning's loggers number them."""
    if not given.is_dir():
        raise ValueError(f"run_dirs must be folders of runs, got {given}, which is none")
    if _is_run(given):
        return given
    versions = [each for each in given.iterdir() if re.fullmatch(r"version_\d+", each.name) and _is_run(each)]
    if not versions:
        raise ValueError(f"run_dirs must hold {METRICS} or {RECORD}, or a version_N that does, got {given}")
    return max(versions, key=lambda each: int(each.name.removeprefix("version_")))


def _is_run(folder: Path) -> bool:
    return (folder / METRICS).is_file() or (folder / RECORD).is_file()


def _names(folders: Sequence[Path]) -> list[str]:
    """As few of the last words of each path as tell them apart; a version that all have in common is left out."""
    parts = [folder.resolve().parts for folder in folders]
    while len(folders) > 1 and len({each[-1] for each in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [each[:-1] for each in parts]
    for many in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-many:]) for each in parts]
        unclear = any(re.fullmatch(r"version_\d+", name) for name in names)
        if len(set(names)) == len(names) and not unclear:
            return names
    return [f"{folder.name} ({i + 1})" for i, folder in enumerate(folders)]


def _read(folder: Path, name: str) -> Run:
    run = Run(name, folder)
    if (folder / METRICS).is_file():
        run.series = _series(folder / METRICS)
        run.files.append(METRICS)
    for config in _CONFIGS:
        if (folder / config).is_file():
            run.settings |= _flat(yaml.load((folder / config).read_text(), _Loader))
            run.files.append(config)
    if (folder / RECORD).is_file():
        run.record = json.loads((folder / RECORD).read_text())
        run.files.append(RECORD)
    return run


def _series(path: Path) -> dict[str, Points]:
    found: dict[str, Points] = {}
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            step = _number(row.get("step"))
            at = float(number) if step is None else step
            for key, text in row.items():
                value = _number(text)
                if value is not None and key not in ("step", "epoch", None):
                    found.setdefault(key, []).append((at, value))
    return {key: sorted(points, key=lambda point: point[0]) for key, points in found.items()}


def _number(text: Any) -> float | None:
    """None for what is none, or not finite: it cannot be drawn."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if isfinite(value) else None


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    """Settings by their whole path, `model.config.dim`; a pattern stays in one piece."""
    if isinstance(values, dict) and values and "branches" not in values:
        found: dict[str, Any] = {}
        for key, value in values.items():
            found |= _flat(value, f"{path}.{key}" if path else str(key))
        return found
    return {path: values} if path else {}
