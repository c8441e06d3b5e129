"""The split check: proves on the first batch that a module computes on parts what it computes on whole sequences."""

from lightning_longnet.split_check.check import SplitMismatch, check_split
from lightning_longnet.split_check.verdict import Verdict

__all__ = ["SplitMismatch", "Verdict", "check_split"]
