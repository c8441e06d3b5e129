"""A stream in memory that counts what is read of it."""

import torch

from lightning_longnet.data.streams import Stream


class Held(Stream):
    def __init__(self, tokens, starts=(0,), identity="held"):
        self.tokens, self._starts, self.identity = torch.as_tensor(tokens), torch.tensor(starts), identity
        self.count = 0

    def __len__(self):
        return len(self.tokens)

    @property
    def starts(self):
        return self._starts

    def _read(self, begin, end):
        self.count += end - begin
        return self.tokens[begin:end]


def drawn(many, seed=0, high=256):
    return torch.randint(high, (many,), generator=torch.Generator().manual_seed(seed))
