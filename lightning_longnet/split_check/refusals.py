"""Refusals: ValueErrors with which this package itself ends a step on split sequences."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_longnet.attention.parallel.agreement import OtherRankError
from lightning_longnet.sequence.refusals import LocalPositionsError
from lightning_longnet.split_check.ranks import gathered_objects

_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class Refusal:
    """The ValueError that this package raised on some rank in a step on split sequences.

    Attributes:
        text: its message; "" if there was none.
        is_of_positions: whether it is about positions that begin at 0 on a rank, where a document may begin.
        is_of_another: whether it says only that another rank raised one.
    """

    text: str = ""
    is_of_positions: bool = False
    is_of_another: bool = False


def refusal_of(error: Exception) -> Refusal:
    """Return the refusal that an error is; an empty one if it is no ValueError that code of this package raised.

    A `Comparison` asks for each error of the step on this rank.
    """
    traceback = error.__traceback__
    if not isinstance(error, ValueError) or traceback is None:
        return Refusal()
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    if str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0] != _PACKAGE:
        return Refusal()
    return Refusal(str(error).strip(), isinstance(error, LocalPositionsError), isinstance(error, OtherRankError))


def first_refusal(refusal: Refusal) -> Refusal:
    """Return on all ranks the refusal of the first rank that has one; an empty one if none has.

    Refusals that only speak of another rank come last.  All ranks call it together, in a `Comparison` after a run in
    which one of them raised an error.
    """
    refusals = [each for each in gathered_objects(refusal) if each.text]
    return min(refusals, key=lambda each: each.is_of_another, default=Refusal())
