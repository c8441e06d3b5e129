"""Reading of the files in the folder of a run, of which any may be missing or incomplete."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_longnet.trust import confined

if TYPE_CHECKING:
    from collections.abc import Sequence

RECORD = "run.json"
METRICS = "metrics.csv"
_CONFIGS = ("config.yaml", "hparams.yaml")

Points = list[tuple[float, float]]


@dataclass
class Run:
    """The content of the files of a run.

    Attributes:
        name: a name that differs from those of the other runs of a report.
        folder: the folder.
        series: metrics.csv, as (step, value) of each metric, ascending.
        settings: config.yaml and hparams.yaml, by paths such as "model.config.dim".
        record: run.json, which the callback `RunReport` writes.
        files: names of the files that were read.
    """

    name: str
    folder: Path
    series: dict[str, Points] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    def points(self, *keys: str) -> Points:
        """Return (step, value) of the first of these metrics that was logged, or an empty list."""
        return next((self.series[key] for key in keys if self.series.get(key)), [])

    def last(self, *keys: str) -> float | None:
        """Return the last value of the first of these metrics that was logged, or its value in run.json, or None."""
        points = self.points(*keys)
        if points:
            return points[-1][1]
        final = self.record.get("final", {})
        return next((final[key] for key in keys if key in final), None)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """A loader that ignores tags, such as those of Python objects, and reads the plain values below them."""


def _plain(loader: yaml.SafeLoader, _: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    assert isinstance(node, yaml.ScalarNode)
    return loader.construct_scalar(node)


_Loader.add_multi_constructor("", _plain)


def read_runs(run_dirs: Sequence[str | Path]) -> list[Run]:
    """Read the runs in these folders; a folder that contains `version_N` stands for the last of them."""
    if not run_dirs:
        raise ValueError("run_dirs must name at least one folder of a run, got none")
    folders = [_folder_of(Path(each)) for each in run_dirs]
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _folder_of(given: Path) -> Path:
    """Return the folder, or the last `version_N` in it, as Lightning's loggers number them.

    Folders that a validation or a test left are taken where no training left one.
    """
    if not given.is_dir():
        raise ValueError(f"run_dirs must be folders of runs, got {given}, which is none")
    if _is_run(given):
        return given
    versions = [each for each in given.iterdir() if re.fullmatch(r"version_\d+", each.name) and _is_run(each)]
    if not versions:
        inside = sorted({each.parent for each in given.glob("*/version_*") if each.is_dir()})
        question = f"; did you mean {' or '.join(map(str, inside))}?" if inside else ""
        raise ValueError(f"run_dirs must hold {METRICS} or {RECORD}, or a version_N that does, got {given}{question}")
    trained = [each for each in versions if _is_training(each)]
    return max(trained or versions, key=lambda each: int(each.name.removeprefix("version_")))


def _is_run(folder: Path) -> bool:
    return (folder / METRICS).is_file() or (folder / RECORD).is_file()


def _is_training(folder: Path) -> bool:
    """Return whether training left a folder: a record, checkpoints, or metrics of something else than validation."""
    if (folder / RECORD).is_file() or (folder / "checkpoints").is_dir():
        return True
    with (folder / METRICS).open(newline="") as file:
        metrics = {*next(csv.reader(file), [])} - {"epoch", "step"}
    return any(not re.match("(val|valid|validation|test)[/_]", each) for each in metrics)


def _names(folders: Sequence[Path]) -> list[str]:
    """Return unique names: the shortest suffixes of the paths that differ, without a `version_N` common to all."""
    parts = [folder.resolve().parts for folder in folders]
    while len(folders) > 1 and len({each[-1] for each in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [each[:-1] for each in parts]
    for many in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-many:]) for each in parts]
        is_version = any(re.fullmatch(r"version_\d+", name) for name in names)
        if len(set(names)) == len(names) and not is_version:
            return names
    return [f"{folder.name} ({i + 1})" for i, folder in enumerate(folders)]


def _read(folder: Path, name: str) -> Run:
    run = Run(name, folder)
    for file in filter(Path.is_symlink, map(folder.joinpath, (METRICS, RECORD, *_CONFIGS))):
        confined("run_dirs", file, folder)
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
    """Return (step, value) of each metric in a metrics.csv; rows without a step are counted."""
    series: dict[str, Points] = {}
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            step = _number(row.get("step"))
            x = float(number) if step is None else step
            for key, text in row.items():
                value = _number(text)
                if value is not None and key not in ("step", "epoch", None):
                    series.setdefault(key, []).append((x, value))
    return {key: sorted(points, key=lambda point: point[0]) for key, points in series.items()}


def _number(text: Any) -> float | None:
    """Return a finite number, or None for other text: a chart shows only finite numbers."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if isfinite(value) else None


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    """Return nested settings by their path, such as `model.config.dim`; a pattern stays a dictionary."""
    if isinstance(values, dict) and values and "branches" not in values:
        settings: dict[str, Any] = {}
        for key, value in values.items():
            settings |= _flat(value, f"{path}.{key}" if path else str(key))
        return settings
    return {path: values} if path else {}
