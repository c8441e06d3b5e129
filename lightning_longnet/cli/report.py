"""longnet report: one page of one run or of several."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """One HTML file, which needs no network, of what runs left in their folders: losses, throughput, memory,
exchange, and pictures of the pattern and the placement.  Several runs are shown side by side.

Read are metrics.csv (CSVLogger), config.yaml (LightningCLI), hparams.yaml and run.json (the callback RunReport),
whichever of them are there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="a run's folder, or one of its version_N")
    parser.add_argument(
        "--out", help="the file; by default report.html in the folder of the run, or here for several runs"
    )
    parser.add_argument("--no-images", action="store_true", help="no PNGs of the charts beside it")


def run(arguments: argparse.Namespace) -> None:
    from lightning_longnet.report import write_report

    path = write_report(arguments.run_dirs, arguments.out, images=False if arguments.no_images else None)
    print(path)  # noqa: T201
