"""The seed of attention dropout."""

from __future__ import annotations

import os

import torch


def dropout_seed() -> int:
    """Return the seed of Lightning's `seed_everything`, or torch's seed in this process if it was not called.

    `SequenceRanks._make_context` broadcasts that of rank 0 to all ranks, for the `SequenceContext`.
    """
    seed = os.environ.get("PL_GLOBAL_SEED")
    return int(seed) if seed is not None else torch.initial_seed() % 2**63
