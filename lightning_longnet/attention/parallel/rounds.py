"""Keys come in rounds: all at once (gather), or from one rank after the other (ring).

    gather   one round holds what every rank wants of every other; it is kept for the backward, which sends dK and dV of
             the same rows home
    ring     a round for each other rank, fetched one ahead: two ranks' keys and values are in memory, never more;
             beside them the copy that is sent, and in the backward the gradients of two.  The backward fetches keys and
             values again and sends dK and dV home round by round

Own blocks are computed while the first round is on its way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.kernels.blocks import merge, no_keys, readable_lse, rounded, spread
from lightning_longnet.attention.kernels.keys import OwnKeys, ReceivedKeys
from lightning_longnet.attention.kernels.partial import Partial
from lightning_longnet.attention.parallel.routes import Indices

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lightning_longnet.attention.kernels import BlockKernel
    from lightning_longnet.attention.kernels.blocks import Terms
    from lightning_longnet.attention.parallel.comm import Comm, Errand, Pending
    from lightning_longnet.attention.parallel.routes import Round, Route


class Rounds(NamedTuple):
    """One rank's exchange with the others.

    `tokens` tells where the rows of a rank stand in the whole, `hidden` which of some tokens padding hides.
    """

    comm: Comm
    errand: Errand
    route: Route
    terms: Terms
    kernel: BlockKernel
    tokens: Callable[[int], Tensor]
    hidden: Callable[[Tensor], Tensor | None]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, branches: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Out, lse, and what the backward is to be given.  `branches`: partials to keep apart, 1 for their sum."""
        terms, rounds = self.terms, self.route.rounds
        totals = [no_keys(q, v) for _ in range(branches)]
        coming = _fetched(self, 0, k, v)
        merge(self.kernel, self.route.own, q, OwnKeys(k, v, terms.hidden, terms.key_words()), terms, totals)
        kept = []
        for i, each in enumerate(rounds):
            at, cells, pending = coming
            pending.wait()
            coming = _fetched(self, i + 1, k, v)
            merge(self.kernel, at.parts, q, _received(self, at, cells, k.shape[3]), terms, totals)
            if each.keeps:
                kept.append(cells)
            del at, cells
        if branches == 1:
            return *rounded(totals[0], q), kept
        return *rounded(_sum(totals), q), [*kept, *(total.out for total in totals)]

    def kept(self, branches: int) -> int:
        """How many tensors the backward is to be given."""
        return sum(each.keeps for each in self.route.rounds) + (branches if branches > 1 else 0)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of the tokens that are here."""
        terms, rounds = self.terms, self.route.rounds
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = (torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (q, k, v))
        keeping = sum(each.keeps for each in rounds)  # those come first
        outs, lse = kept[keeping:] or (out,), readable_lse(lse)
        returning: list[Callable[[], None]] = []

        def spread_round(i: int, at: Indices, cells: Tensor) -> None:
            dcells = torch.zeros_like(cells, dtype=wide)
            keys = _received(self, at, cells, k.shape[3], dcells)
            spread(self.kernel, at.parts, grad, q, keys, outs, lse, terms, dq)
            if returning:
                returning.pop()()  # one at most is on its way
            returning.append(_returned(self, rounds[i], at, dcells, dk, dv))

        for i in range(keeping):
            spread_round(i, rounds[i].indices(), kept[i])
        coming = _fetched(self, keeping, k, v)
        own = OwnKeys(k, v, terms.hidden, terms.key_words(), (dk, dv))
        spread(self.kernel, self.route.own, grad, q, own, outs, lse, terms, dq)
        for i in range(keeping, len(rounds)):
            at, cells, pending = coming
            pending.wait()
            # Two ranks have two messages each way here, the keys of one turn and the gradients of another.  They come
            # in one order, though either may leave out turns of its own: the keys of t + 1, the gradients of t
            is_next = i + 1 < len(rounds) and rounds[i + 1].turn == rounds[i].turn + 1
            if is_next:
                coming = _fetched(self, i + 1, k, v)
            spread_round(i, at, cells)
            if not is_next:
                coming = _fetched(self, i + 1, k, v)
            del at, cells
        for finish in returning:
            finish()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _sum(totals: Sequence[Partial]) -> Partial:
    whole = Partial(totals[0].out.clone(), totals[0].lse.clone())
    for each in totals[1:]:
        whole.add_(*each)
    return whole


def _fetched(exchange: Rounds, i: int, k: Tensor, v: Tensor) -> tuple[Indices, Tensor, Pending]:
    """What round `i` brings, (cells, B, D + Dv): not there before it was waited for."""
    rounds = exchange.route.rounds
    if i >= len(rounds):
        return Indices({}, {}, ()), k, exchange.comm.swap({}, {}, exchange.errand, "nothing")
    each, at = rounds[i], rounds[i].indices()
    batch, _, _, width = k.shape
    flat_k, flat_v = (x.flatten(1, 2) for x in (k, v))
    send = {}
    for peer, cells in at.send.items():
        here = cells.to(k.device, torch.long)
        send[peer] = torch.cat((flat_k[:, here], flat_v[:, here]), -1).transpose(0, 1).contiguous()
    total = sum(map(len, at.receive.values()))
    received = k.new_empty((total, batch, width + v.shape[3]))
    pieces = dict(zip(at.receive, received.split([len(c) for c in at.receive.values()]), strict=True))
    return at, received, exchange.comm.swap(send, pieces, exchange.errand, f"keys and values{_turn(each)}")


def _turn(each: Round) -> str:
    """The same on both sides of a message, as a round's number is not: ranks leave out those that bring nothing."""
    return f" of turn {each.turn}" if each.turn else ""


def _returned(exchange: Rounds, each: Round, at: Indices, dcells: Tensor, dk: Tensor, dv: Tensor) -> Callable[[], None]:
    """Send the gradients of a round to whose keys they are; what is returned waits for one's own and adds them."""
    send = dict(zip(at.receive, dcells.split([len(c) for c in at.receive.values()]), strict=True))
    back = {peer: dcells.new_empty((len(cells), *dcells.shape[1:])) for peer, cells in at.send.items()}
    pending = exchange.comm.swap(send, back, exchange.errand, f"gradients{_turn(each)}")

    def finish() -> None:
        pending.wait()
        for peer, found in back.items():
            here = at.send[peer].to(dk.device, torch.long)
            parts = found.transpose(0, 1).split((dk.shape[3], dv.shape[3]), -1)
            for into, part in zip((dk, dv), parts, strict=True):
                into.flatten(1, 2).index_add_(1, here, part)

    return finish


def _received(
    exchange: Rounds, at: Indices, cells: Tensor, width: int, gradients: Tensor | None = None
) -> ReceivedKeys:
    terms, kv_heads = exchange.terms, exchange.route.kv_heads
    hidden = words = None
    if terms.hidden is not None or terms.dropout is not None:
        found = [exchange.tokens(peer)[cells // kv_heads] for peer, cells in at.receive.items()]
        tokens = torch.cat(found) if found else torch.empty(0, dtype=torch.long)
        tokens = tokens.to(cells.device)
        hidden = exchange.hidden(tokens)
        words = None if terms.dropout is None else terms.dropout.key_words(tokens)
    return ReceivedKeys(cells, width, hidden, words, gradients)
