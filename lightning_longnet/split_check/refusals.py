"""Refusals: errors with which this package itself ends a step on parts."""

from __future__ import annotations

from lightning_longnet.split_check.ranks import gathered_objects

_PACKAGE = __name__.partition(".")[0]
_OF_ANOTHER = "of the group was given arguments that do not fit"  # what other ranks say of the one that refused


def is_refusal(error: Exception) -> bool:
    """Return whether an error is a ValueError that this package raised, and not a module of a user or a library."""
    traceback = error.__traceback__
    if not isinstance(error, ValueError) or traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0] == _PACKAGE


def first_refusal(refusal: str) -> str:
    """Return on all ranks the refusal of the first that has one, of which those that speak of another rank are last."""
    found = [each for each in gathered_objects(refusal) if each]
    return next((each for each in found if _OF_ANOTHER not in each), next(iter(found), ""))
