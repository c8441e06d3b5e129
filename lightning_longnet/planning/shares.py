"""The shares of its peak that a GPU reaches, as `make gpu` measured them on one of this kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

# {name of a data sheet: {"gpu", "linear", "attention", "call_seconds", "torch", "date", ...}}; `make gpu` adds to it
FILE = Path(__file__).with_name("shares.json")


class Shares(NamedTuple):
    """The shares of a device's peak, and where they are from.

    Attributes:
        linear, attention: shares of the peak, more than 0 and at most 1.
        call_seconds: the time of an operator, however small.
        source: where they were measured.
    """

    linear: float
    attention: float
    call_seconds: float
    source: str


def measured_shares(name: str, file: Path = FILE) -> Shares | None:
    """Return the shares that were measured of the device of a data sheet, or None if none were."""
    row = json.loads(file.read_text()).get(name) if file.exists() else None
    if row is None:
        return None
    linear, attention, seconds = (row.get(key) for key in ("linear", "attention", "call_seconds"))
    for key, share in (("linear", linear), ("attention", attention)):
        if not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"{key} of {name} in {file} must be more than 0 and at most 1, got {share!r}")
    if not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ValueError(f"call_seconds of {name} in {file} must be more than 0, got {seconds!r}")
    source = f"measured on {row['gpu']} with torch {row['torch']}, {row['date'][:10]}"
    return Shares(float(linear), float(attention), float(seconds), source)
