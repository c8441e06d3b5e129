"""Reports about runs: one HTML file that needs no network."""

from lightning_longnet.report.page import write_report
from lightning_longnet.report.runs import RECORD

__all__ = ["RECORD", "write_report"]
