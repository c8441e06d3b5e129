"""`longnet report`: write one page about one run or several."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """Write one HTML file about runs, from the files in their folders: losses, throughput, memory,
exchange, and pictures of the pattern and the placement.  It needs no network.  Several runs are shown side by side.

The files are metrics.csv (CSVLogger), config.yaml (LightningCLI), hparams.yaml and run.json (the callback RunReport);
missing ones are skipped."""

EXAMPLE = "longnet report runs/quickstart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="a run's folder, or one of its version_N")
    parser.add_argument(
        "--out", help="the file; by default report.html in the folder of the run, or here for several runs"
    )
    parser.add_argument("--no-images", action="store_true", help="write no PNGs of the charts")


def run(arguments: argparse.Namespace) -> None:
    """Write the report, and print its path."""
    from lightning_longnet.cli.progress import steps
    from lightning_longnet.report import write_report

    with steps("drawing", "picture") as report:
        path = write_report(arguments.run_dirs, arguments.out, False if arguments.no_images else None, report)
    print(path)  # noqa: T201
