"""The split check: compares on the first batch what a module computes on split sequences and on whole ones."""

from lightning_longnet.split_check.check import SplitMismatch, check_split
from lightning_longnet.split_check.verdict import Verdict

__all__ = ["SplitMismatch", "Verdict", "check_split"]
