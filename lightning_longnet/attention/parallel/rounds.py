"""Gather and ring: keys travel in rounds, all at once or from one rank after the other.

    gather   one round brings the rows that a rank needs of all others; they are kept for the backward, which sends dK
             and dV of the same rows back
    ring     a round for each other rank, fetched one ahead: the keys and values of two ranks are in memory, never more;
             beside them the copy that is sent, and in the backward the gradients of two.  The backward fetches keys and
             values again and sends dK and dV back round by round

The blocks on a rank's own keys are computed while the first round is on its way.  Whole sequences on one process are
the case without rounds.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.kernels.blocks import (
    BackwardInputs,
    PairOptions,
    backward_blocks,
    backward_lse,
    empty_partial,
    finished,
    forward_blocks,
    initial_partial,
    merged,
)
from lightning_longnet.attention.kernels.keys import OwnKeys, ReceivedKeys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from lightning_longnet.attention.kernels import BlockKernel
    from lightning_longnet.attention.kernels.partial import Partial
    from lightning_longnet.attention.parallel.comm import Comm, MessageContext, Pending
    from lightning_longnet.attention.parallel.routes import Round, RoundIndices, Route
    from lightning_longnet.attention.plan.block import Part


class RemoteRows(NamedTuple):
    """The messages of a call, and what is known of the rows on other ranks.

    `tokens(rank)` returns the index in the whole sequence of a rank's tokens, and `padding_of(tokens)` (B, tokens),
    True where padding hides one, or None.
    """

    comm: Comm
    message: MessageContext
    tokens: Callable[[int], Tensor]
    padding_of: Callable[[Tensor], Tensor | None]


class RoundsCall(NamedTuple):
    """One forward or backward on this rank; without `remote` all keys are on this process.

    `own_outs` is the number of branches whose own results the backward takes, those of "detached"; 0 where it takes the
    result of all branches.  With `keeps_outs` the forward keeps them; otherwise the backward computes them again.
    """

    kernel: BlockKernel
    route: Route
    options: PairOptions
    own_outs: int = 0
    keeps_outs: bool = False
    remote: RemoteRows | None = None

    @property
    def keeps_inputs(self) -> bool:
        return False

    @property
    def _kept_outs(self) -> int:
        return self.own_outs if self.keeps_outs else 0

    @property
    def kept_count(self) -> int:
        return sum(each.keeps for each in self.route.rounds) + self._kept_outs

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Compute the attention of this rank's queries.

        The operator `lightning_longnet::attend` calls it once for each group of samples with equal documents.
        """
        total, kept = self.partial(q, k, v)
        return *finished(total, q, self.options.sinks), kept

    def partial(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Partial, list[Tensor]]:
        """Merge the blocks of this rank's queries by their lse; return the result and what the backward needs besides.

        The blocks on this rank's own keys are computed while the first round is in flight, those of each round when it
        has arrived.
        """
        # with padding, `forward_blocks` skips segments without a key, and nothing would write their rows
        stores = self.route.writes_queries and self.options.key_padding_mask is None
        totals = [(empty_partial if stores else initial_partial)(q, v) for _ in range(self._kept_outs or 1)]
        fetched = self._fetch(0, k, v)
        forward_blocks(self.kernel, self.route.own, q, self._own_keys(k, v), self.options, totals, stores)
        kept = []
        for i, each in enumerate(self.route.rounds):
            assert fetched is not None
            indices, cells, pending = fetched
            pending.wait()
            fetched = self._fetch(i + 1, k, v)
            keys = self._received_keys(indices, cells, k.shape[3])
            forward_blocks(self.kernel, indices.parts, q, keys, self.options, totals)
            if each.keeps:
                kept.append(cells)
            del indices, cells, keys
        outs = [each.out for each in totals] if self._kept_outs else []
        return merged(totals, self.options, is_kept=bool(outs)), [*kept, *outs]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute dq, dk and dv of this rank's tokens in the type of q.

        The operator `lightning_longnet::attend_backward` calls it, once for each call of `forward`.
        """
        gradients = self.gradients(grad, q, k, v, out, lse, kept)
        # each accumulator is freed as soon as it is rounded
        dq, dk, dv = (gradients.pop(0).to(q.dtype) for _ in range(3))
        return dq, dk, dv

    def gradients(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return dq, dk and dv of this rank's tokens as they were accumulated, in float32 or float64.

        Gradients of received keys travel back to their ranks.  `out` and `lse` are those of the whole softmax.
        """
        rounds, wide = self.route.rounds, torch.promote_types(q.dtype, torch.float32)
        stores, stores_keys = (
            writes and self.options.key_padding_mask is None
            for writes in (self.route.writes_queries, self.route.writes_keys)
        )
        dq, dk, dv = (
            (torch.empty_like if written else torch.zeros_like)(x, dtype=wide, memory_format=torch.contiguous_format)
            for x, written in ((q, stores), (k, stores_keys), (v, stores_keys))
        )
        keeping = sum(each.keeps for each in rounds)  # the rows that the forward kept come before its partials
        outs, lse = list(kept[keeping:]) or [out], backward_lse(lse)
        pending_gradients: list[Callable[[], None]] = []

        def backward_round(i: int, indices: RoundIndices, cells: Tensor) -> None:
            dcells = torch.zeros_like(cells, dtype=wide)
            keys = self._received_keys(indices, cells, k.shape[3], dcells)
            inputs = BackwardInputs(grad, outs, lse)
            backward_blocks(self.kernel, indices.parts, q, keys, inputs, self.options, dq)
            if pending_gradients:
                pending_gradients.pop()()  # at most one message of gradients is on its way
            pending_gradients.append(self._send_gradients(rounds[i], indices, dcells, dk, dv))

        for i in range(keeping):
            backward_round(i, rounds[i].indices(), kept[i])
        fetched = self._fetch(keeping, k, v)
        keys = self._own_keys(k, v, (dk, dv))
        for branch_outs, parts in self._own_parts(q, keys, v, outs):
            inputs = BackwardInputs(grad, branch_outs, lse)
            backward_blocks(self.kernel, parts, q, keys, inputs, self.options, dq, (stores, stores_keys))
        for i in range(keeping, len(rounds)):
            assert fetched is not None
            indices, cells, pending = fetched
            pending.wait()
            # Two ranks have two messages each way here, the keys of one step and the gradients of another.  Both must
            # send them in one order, though either may leave out steps: the keys of t + 1, then the gradients of t
            is_next = i + 1 < len(rounds) and rounds[i + 1].ring_step == rounds[i].ring_step + 1
            if is_next:
                fetched = self._fetch(i + 1, k, v)
            backward_round(i, indices, cells)
            if not is_next:
                fetched = self._fetch(i + 1, k, v)
            del indices, cells
        for finish in pending_gradients:
            finish()
        return [dq, dk, dv]

    def _own_keys(self, k: Tensor, v: Tensor, gradients: tuple[Tensor, Tensor] | None = None) -> OwnKeys:
        options = self.options
        return OwnKeys(k, v, options.key_padding_mask, options.key_words(), options.key_tokens(), gradients)

    def _own_parts(
        self, q: Tensor, keys: OwnKeys, v: Tensor, outs: list[Tensor]
    ) -> Iterator[tuple[list[Tensor], tuple[Part, ...]]]:
        """Yield the own parts with the outs that their gradients need, which "detached" computes again here."""
        if not self.own_outs or self._kept_outs:
            yield outs, self.route.own
            return
        for _, group in groupby(self.route.own, key=lambda part: part.branch):
            parts = tuple(group)
            branch = initial_partial(q, v)
            forward_blocks(self.kernel, parts, q, keys, self.options, [branch])
            if self.options.null_keys is not None:
                self.options.null_keys.add_to(branch, parts[0].branch)
            yield [branch.out], parts

    def _fetch(self, i: int, k: Tensor, v: Tensor) -> tuple[RoundIndices, Tensor, Pending] | None:
        """Start round `i`, if there is one: its rows (cells, B, D + Dv) are there once its messages were waited for."""
        if i >= len(self.route.rounds):
            return None
        assert self.remote is not None
        each = self.route.rounds[i]
        indices = each.indices()
        batch, _, _, width = k.shape
        flat_k, flat_v = (x.flatten(1, 2) for x in (k, v))
        send = {}
        for peer, cells in indices.send.items():
            rows = cells.to(k.device, torch.long)
            send[peer] = torch.cat((flat_k[:, rows], flat_v[:, rows]), -1).transpose(0, 1).contiguous()
        counts = [len(cells) for cells in indices.receive.values()]
        received = k.new_empty((sum(counts), batch, width + v.shape[3]))
        pieces = dict(zip(indices.receive, received.split(counts), strict=True))
        pending = self.remote.comm.exchange(send, pieces, self.remote.message, f"keys and values{_step(each)}")
        return indices, received, pending

    def _send_gradients(
        self, each: Round, indices: RoundIndices, dcells: Tensor, dk: Tensor, dv: Tensor
    ) -> Callable[[], None]:
        """Send dK and dV of a round's keys to the ranks that own them.

        Returns a function that waits for the dK and dV of this rank's own keys and adds them to dk and dv.
        """
        assert self.remote is not None
        send = dict(zip(indices.receive, dcells.split([len(c) for c in indices.receive.values()]), strict=True))
        back = {peer: dcells.new_empty((len(cells), *dcells.shape[1:])) for peer, cells in indices.send.items()}
        pending = self.remote.comm.exchange(send, back, self.remote.message, f"gradients{_step(each)}")

        def finish() -> None:
            pending.wait()
            for peer, gradients in back.items():
                rows = indices.send[peer].to(dk.device, torch.long)
                parts = gradients.transpose(0, 1).split((dk.shape[3], dv.shape[3]), -1)
                for total, part in zip((dk, dv), parts, strict=True):
                    total.flatten(1, 2).index_add_(1, rows, part)

        return finish

    def _received_keys(
        self, indices: RoundIndices, cells: Tensor, width: int, gradients: Tensor | None = None
    ) -> ReceivedKeys:
        """Return the keys and values of a round with their padding, the words of dropout and their tokens."""
        assert self.remote is not None
        padding = words = tokens = None
        dropout, hides_later = self.options.dropout, self.options.hides_later
        if self.options.key_padding_mask is not None or dropout is not None or hides_later:
            heads = self.route.kv_heads
            rows = [self.remote.tokens(peer)[peer_cells // heads] for peer, peer_cells in indices.receive.items()]
            tokens = (torch.cat(rows) if rows else torch.empty(0, dtype=torch.long)).to(cells.device)
            padding = self.remote.padding_of(tokens)
            words = None if dropout is None else dropout.key_words(tokens)
        return ReceivedKeys(cells, width, padding, words, tokens if hides_later else None, gradients)


def _step(each: Round) -> str:
    """Name a ring step as both sides do; a round's number differs, since ranks leave out rounds that bring nothing."""
    return f" of turn {each.ring_step}" if each.ring_step else ""
