"""A chart as a file of its own: a page of HTML, or what matplotlib writes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from lightning_longnet.report.page import document, figure

if TYPE_CHECKING:
    from pathlib import Path

    from lightning_longnet.report.charts import Chart

IMAGES = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raise a ValueError where a chart cannot be written to this path."""
    if path.suffix not in (".html", *IMAGES):
        raise ValueError(f"--plot must be a file .html, {', '.join(IMAGES)}, got {path}")
    if path.suffix in IMAGES and find_spec("matplotlib") is None:
        raise ValueError(f"{path} needs matplotlib: pip install 'lightning-longnet[plots]', or take a file .html")


def check_image(path: Path) -> None:
    """Raise a ValueError where matplotlib cannot write a picture to this path."""
    if path.suffix not in IMAGES:
        raise ValueError(f"--plot must be a file {', '.join(IMAGES)}, got {path}")
    if find_spec("matplotlib") is None:
        raise ValueError(f"{path} needs matplotlib: pip install 'lightning-longnet[plots]'")


def write_plot(chart: Chart, path: Path) -> None:
    """Write a chart to a file: .html, or with matplotlib .png, .svg or .pdf."""
    check_plot(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        path.write_text(document(chart.title, [f"<h1>{chart.title}</h1>", figure(chart)]))
        return
    from lightning_longnet.report.images import figure_of

    figure_of(chart).savefig(path, dpi=150)
