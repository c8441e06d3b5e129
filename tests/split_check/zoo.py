"""The base of modules as users write them, for the split check: steps on batches, as in `faults`.

A class may set LENGTH, the number of tokens of its batch, KIND, the verdict on it, and `more`, which adds tensors to
its batch.
"""

import torch
from faults import Base

DIMS = {"0": 1, "1": 1, "position_ids": 1, "features": 1, "signal": 0, "lengths": None, "label": None, "targets": 1}


class Zoo(Base):
    LENGTH = 312

    @classmethod
    def more(cls, batch):
        return batch


def rotated(x, places):
    angles = places[..., None, None] / 10 ** torch.arange(0, 2, dtype=x.dtype)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1).flatten(-2)
