"""`TokenShares`: the tokens of a long step over the ranks that share a cache, each of which computes some of them.

The new tokens of such a step see no row of the cache.  So attention is that of training, of sequences that are split
over ranks, and afterwards each row goes to the rank that keeps it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from lightning_longnet.attention import SequenceShard
from lightning_longnet.attention.parallel.comm import MessageContext

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_longnet.inference.plan import NewTokens, Write
    from lightning_longnet.inference.ranks import CacheRanks
    from lightning_longnet.inference.rows import RowStore

# Steps of fewer tokens for each rank are computed by all ranks, which costs less than the messages
SHARED_TOKENS = 64
_ROWS = MessageContext("the prompt of a cache", "rows of a prompt")


class TokenShares:
    """The consecutive tokens of each rank in a step, and the routes of their keys and values.

    Args:
        ranks: the ranks.
        tokens: the tokens of all ranks.

    Attributes:
        own: the tokens of this rank.
        shard: the shard with which they attend.
    """

    def __init__(self, ranks: CacheRanks, tokens: NewTokens) -> None:
        self.ranks, count = ranks, tokens.longest
        self.cuts = [count * rank // ranks.size for rank in range(ranks.size + 1)]
        self.own = slice(*self.cuts[ranks.rank : ranks.rank + 2])
        documents = None if tokens.documents is None else tokens.documents[:, self.own].contiguous()
        self.shard = SequenceShard(ranks.group, self.own.stop - self.own.start, documents=documents)
        if ranks.comm is not None:
            self.shard.comm.traffic = ranks.comm.traffic

    def whole(self, x: Tensor) -> Tensor:
        """Return the x (B, N, ...) of all tokens, out of those (B, n, ...) of each rank."""
        sizes = [end - begin for begin, end in pairwise(self.cuts)]
        padded = x.new_zeros((max(sizes), *x.shape[:1], *x.shape[2:]))
        padded[: x.shape[1]] = x.transpose(0, 1)
        everywhere = self.ranks.all_gather(padded.view(torch.uint8), "gathers the states of a prompt")
        parts = [part[:size] for part, size in zip(everywhere.view(x.dtype), sizes, strict=True)]
        return torch.cat(parts).transpose(0, 1).contiguous().to(x.device)

    def routes(self, writes: Sequence[Write]) -> list[list[tuple[Write, Write]]]:
        """Return which rows of the branches this rank sends to each rank, and which it gets from each.

        The tokens of both count those of the rank that has computed them, and the slots those of the one that keeps
        them.
        """
        places = torch.tensor(self.cuts[1:], device=writes[0].tokens.device)
        begins = torch.tensor(self.cuts, device=places.device)
        found: list[list[tuple[Write, Write]]] = [[] for _ in range(self.ranks.size)]
        for write in writes:
            sources = torch.searchsorted(places, write.tokens, right=True)
            keepers = write.slots % self.ranks.size
            local = write._replace(slots=write.slots // self.ranks.size, tokens=write.tokens - begins[sources])
            for rank, pairs in enumerate(found):
                sent = (sources == self.ranks.rank) & (keepers == rank)
                got = (sources == rank) & (keepers == self.ranks.rank)
                pairs.append((local.those(sent), local.those(got)))
        return found

    def scatter(self, kv: Tensor, stores: Sequence[RowStore], routes: list[list[tuple[Write, Write]]]) -> None:
        """Write the rows of kv (2, B, Hkv, n, D), of each rank's tokens, to the slots of the ranks that keep them."""
        send: dict[int, Tensor] = {}
        receive: dict[int, Tensor] = {}
        for rank, pairs in enumerate(routes):
            if rank == self.ranks.rank:
                for store, (write, _) in zip(stores, pairs, strict=True):
                    store.scatter(kv, write)
                continue
            if rows := [kv[:, w.batch, w.heads, w.tokens] for w, _ in pairs if len(w.slots)]:
                send[rank] = torch.cat(rows, 1)
            if count := sum(len(w.slots) for _, w in pairs):
                receive[rank] = kv.new_empty((2, count, kv.shape[4]))
        self.ranks.exchange(send, receive, _ROWS)
        for rank, received in receive.items():
            parts = received.split([len(w.slots) for _, w in routes[rank]], 1)
            for store, part, (_, write) in zip(stores, parts, routes[rank], strict=True):
                store.place(part, write)
