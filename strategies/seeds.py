"""The seed of attention dropout."""

from __future__ import annotations

import os

import torch


def dropout_seed() -> int:
    """Return the seed of `seed_everything`, so that a run can be repeated; else torch's seed in this process."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return int(seed) if seed is not None else torch.initial_seed() % 2**63
