"""The seed that attention dropout follows."""

from __future__ import annotations

import os

import torch


def dropout_seed() -> int:
    """That of `seed_everything`, so that a run can be repeated; else one of this process."""
    given = os.environ.get("PL_GLOBAL_SEED")
    return int(given) if given is not None else torch.initial_seed() % 2**63
