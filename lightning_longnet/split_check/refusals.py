"""Refusals: errors with which this package itself ends a step on parts."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_longnet.attention.parallel.agreement import OtherRankError
from lightning_longnet.sequence.refusals import LocalPositionsError
from lightning_longnet.split_check.ranks import gathered_objects

_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class Refusal:
    """The ValueError with which this package refused parts on some rank.

    Attributes:
        text: its message, or "" where no rank refused.
        is_of_positions: whether it is of positions that begin at 0 on a rank, as they may where a document begins.
        is_of_another: whether it says only that another rank refused.
    """

    text: str = ""
    is_of_positions: bool = False
    is_of_another: bool = False


def refusal_of(error: Exception) -> Refusal:
    """Return the refusal that an error is: a ValueError of this package, and not of a user's module or a library."""
    traceback = error.__traceback__
    if not isinstance(error, ValueError) or traceback is None:
        return Refusal()
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    if str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0] != _PACKAGE:
        return Refusal()
    return Refusal(str(error).strip(), isinstance(error, LocalPositionsError), isinstance(error, OtherRankError))


def first_refusal(refusal: Refusal) -> Refusal:
    """Return on all ranks the refusal of the first that has one, of which those that speak of another rank are last."""
    refusals = [each for each in gathered_objects(refusal) if each.text]
    return min(refusals, key=lambda each: each.is_of_another, default=Refusal())
