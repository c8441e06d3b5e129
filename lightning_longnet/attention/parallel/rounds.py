"""Gather and ring: keys travel in rounds, all at once or from one rank after the other.

    gather   one round brings the rows that a rank needs of all others; they are saved for the backward, which sends dK
             and dV of the same rows back
    ring     a round for each other rank, fetched one ahead: the keys and values of two ranks are in memory, never more;
             beside them the copy that is sent, and in the backward the gradients of two.  The backward fetches keys and
             values again and sends dK and dV back round by round

The blocks on a rank's own keys are computed while the first round is on its way.  Whole sequences, on one
process or of a rank's heads ("swap"), have no rounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.kernels.accumulator import Accumulator
from lightning_longnet.attention.kernels.blocks import BackwardInputs, backward_blocks, forward_blocks
from lightning_longnet.attention.kernels.keys import OwnKeys, ReceivedKeys
from lightning_longnet.attention.kernels.partial import backward_lse, finalized, merge_branches, no_key_partial
from lightning_longnet.attention.parallel.received_rows import rows_by_rank, rows_of_one_head

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from lightning_longnet.attention.kernels import BlockKernel, PartsKernel
    from lightning_longnet.attention.kernels.keys import Keys
    from lightning_longnet.attention.kernels.pair_options import PairOptions
    from lightning_longnet.attention.kernels.partial import Partial
    from lightning_longnet.attention.parallel.comm import Comm, MessageContext, Pending
    from lightning_longnet.attention.parallel.routes import Round, RoundIndices, Route
    from lightning_longnet.attention.plan.parts import Parts


# The indices of a ring are kept while they take at most this share of the memory of a rank's keys and values
INDEX_SHARE = 0.25


class RemoteRows(NamedTuple):
    """The messages of a call, and the tokens and the padding of KV rows on other ranks.

    `RoundsPlan` makes it for each of its calls.  `RoundsCall` reads it where it has rounds.

    Attributes:
        comm: sends and receives.
        message: the description of the call in errors and message tags.
        tokens: returns for a rank the index in the whole sequence of each of its tokens, on the device of the rows.
        padding_of: returns for tokens (N,) the mask (B, N), True where padding masks one; None without padding.
    """

    comm: Comm
    message: MessageContext
    tokens: Callable[[int], Tensor]
    padding_of: Callable[[Tensor], Tensor | None]


class RoundsCall(NamedTuple):
    """One forward or backward of attention on this rank, by gather or ring, or on whole sequences.

    `RoundsPlan` makes it for gather and ring, `_line_call` of calls.py for the whole sequences of one process, and
    `AllToAllPlan` for those of this rank's heads after an all_to_all.  It is an `ExchangeCall`.

    Attributes:
        kernel: computes the blocks.
        route: the blocks on this rank's keys, and the rounds.
        options: the options of all pairs.
        branch_outs: the number of branches whose separate outs the backward takes, for "detached"; 0 where it takes the
            out of all branches together.
        saves_outs: whether the forward saves these outs; otherwise the backward computes them again.
        remote: how to fetch the KV rows of other ranks; None without a shard, and for "swap".
    """

    kernel: BlockKernel | PartsKernel
    route: Route
    options: PairOptions
    branch_outs: int = 0
    saves_outs: bool = False
    remote: RemoteRows | None = None

    @property
    def saves_inputs(self) -> bool:
        """False: the backward reads q, k, v and out, which autograd saves."""
        return False

    @property
    def _saved_outs(self) -> int:
        """The number of outs of branches that the forward saves: 0 unless the mix is "detached" over ranks."""
        return self.branch_outs if self.saves_outs else 0

    @property
    def saved_count(self) -> int:
        """The number of tensors that the forward saves: the received rows of gathers, and outs of branches.

        The operator of the backward asks, and the calls that contain this one, such as `LinesCall`.
        """
        return sum(step.saves_rows for step in self.route.rounds) + self._saved_outs

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return out and lse of this rank's queries, and the tensors that the backward needs beside q, k, v and these.

        The operator `lightning_longnet::attend` calls it once for each group of samples with equal documents, directly
        or through one or more of `AllToAllCall`, `ReorderedCall` and `JoinedCall`; a `LinesCall` calls `partial`
        instead.  Without a shard a `JoinedCall` joins samples with different documents to one long row.  For the shapes
        see `ExchangeCall.forward`.
        """
        total, saved = self.partial(q, k, v)
        return *finalized(total, q, self.options.sinks), saved

    def partial(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Partial, list[Tensor]]:
        """Merge the blocks of this rank's queries by their lse; return the result and what the backward needs besides.

        The result, without sinks, is out (B, L, H, Dv) and lse (B, L, H, 1).  The blocks on this rank's own keys are
        computed while the first round is in flight, those of each round when it has arrived.  `forward` calls it, and
        `LinesCall` for each of its lines.
        """
        # with padding, `forward_blocks` skips segments without a key, and nothing would write their rows; nor would the
        # first branch write those of the others
        saved_outs = self._saved_outs
        stores = self.route.writes_queries and self.options.key_padding_mask is None and not saved_outs
        totals: list[Partial | None] = [None if stores else no_key_partial(q, v) for _ in range(saved_outs or 1)]
        fetched = self._fetch(0, k, v)
        options = self.options._replace(per_branch=True) if saved_outs else self.options
        forward_blocks(self.kernel, self.route.own, q, self._own_keys(k, v), options, totals)
        saved = []
        for i, step in enumerate(self.route.rounds):
            assert fetched is not None
            indices, kv_rows, pending = fetched
            pending.wait()
            fetched = self._fetch(i + 1, k, v)
            keys = self._received_keys(indices, kv_rows, k.shape[3])
            forward_blocks(self.kernel, indices.parts, q, keys, options, totals)
            if step.saves_rows:
                saved.append(kv_rows)
            del indices, kv_rows, keys
        partials = [total for total in totals if total is not None]
        outs = [partial.out for partial in partials] if saved_outs else []
        return merge_branches(partials, self.options, is_saved=bool(outs)), [*saved, *outs]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, saved: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute dq, dk and dv of this rank's tokens in the type of q.

        The operator `lightning_longnet::attend_backward` calls it once for each call of `forward` that is
        differentiated, directly or through an `AllToAllCall`, a `ReorderedCall` or a `JoinedCall`; a `LinesCall` calls
        `gradients` instead.  `saved` holds the received rows of gathers, and then the outs of branches; inside of an
        `AllToAllCall` it may hold the merged out alone.
        """
        gradients = self.gradients(grad, q, k, v, out, lse, saved, is_whole=True)
        # each accumulator is freed as soon as it is rounded
        dq, dk, dv = (gradients.pop(0).take(q.dtype) for _ in range(3))
        return dq, dk, dv

    def gradients(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        saved: Sequence[Tensor],
        is_whole: bool = False,
    ) -> list[Accumulator]:
        """Return dq, dk and dv of this rank's tokens as they were accumulated, in float32 or float64.

        Gradients of received keys travel back to their ranks.  `out` and `lse` are those of the whole softmax.
        `backward` calls it, and `LinesCall` for each of its lines.  With `is_whole`, which `backward` alone sets,
        nothing is added later: if there are no rounds, a kernel may then give a gradient in the type of q.
        """
        rounds, wide = self.route.rounds, torch.promote_types(q.dtype, torch.float32)
        stores, stores_keys = (
            writes and self.options.key_padding_mask is None
            for writes in (self.route.writes_queries, self.route.writes_keys)
        )
        is_whole = is_whole and not rounds and not (self.branch_outs and not self._saved_outs)
        dq, dk, dv = (Accumulator(x, s, is_whole) for x, s in ((q, stores), (k, stores_keys), (v, stores_keys)))
        saved_rounds = sum(step.saves_rows for step in rounds)  # their rows come before the outs of branches in `saved`
        has_keys = stores and not self.options.masks_later and self.route.own.has_keys
        outs, lse = list(saved[saved_rounds:]) or [out], backward_lse(lse, has_keys)
        pending_gradients: list[Callable[[], None]] = []

        def backward_round(i: int, indices: RoundIndices, kv_rows: Tensor) -> None:
            """Add what a round's keys give to dq, and begin to send their own gradients home."""
            dkv_rows = torch.zeros_like(kv_rows, dtype=wide)
            keys = self._received_keys(indices, kv_rows, k.shape[3], dkv_rows)
            inputs = BackwardInputs(grad, outs, lse)
            backward_blocks(self.kernel, indices.parts, q, keys, inputs, self.options, dq)
            if pending_gradients:
                pending_gradients.pop()()  # at most one message of gradients is on its way
            pending_gradients.append(self._send_gradients(rounds[i], indices, dkv_rows, dk, dv))

        for i in range(saved_rounds):
            backward_round(i, self._indices(rounds[i], k, v), saved[i])
        fetched = self._fetch(saved_rounds, k, v)
        keys = self._own_keys(k, v, (dk, dv))
        for branch_outs, parts in self._own_parts(q, keys, v, outs):
            inputs = BackwardInputs(grad, branch_outs, lse)
            backward_blocks(self.kernel, parts, q, keys, inputs, self.options, dq, (stores, stores_keys))
        for i in range(saved_rounds, len(rounds)):
            assert fetched is not None
            indices, kv_rows, pending = fetched
            pending.wait()
            # Two ranks have two messages each way here, the keys of one step and the gradients of another.  Both must
            # send them in one order, though either may leave out steps: the keys of t + 1, then the gradients of t
            is_next = i + 1 < len(rounds) and rounds[i + 1].ring_step == rounds[i].ring_step + 1
            if is_next:
                fetched = self._fetch(i + 1, k, v)
            backward_round(i, indices, kv_rows)
            if not is_next:
                fetched = self._fetch(i + 1, k, v)
            del indices, kv_rows
        for finish in pending_gradients:
            finish()
        return [dq, dk, dv]

    def _own_keys(self, k: Tensor, v: Tensor, accumulators: tuple[Accumulator, Accumulator] | None = None) -> OwnKeys:
        """Return the keys and values that no round brings, with their padding, and dropout's words and tokens of keys.

        Each of the last three is None where no pair depends on it.  `partial` calls it in a forward, and `gradients` in
        a backward with the accumulators of dk and dv, to which the blocks add.
        """
        options = self.options
        return OwnKeys(k, v, options.key_padding_mask, options.key_words(), options.key_tokens(), accumulators)

    def _own_parts(
        self, q: Tensor, keys: OwnKeys, v: Tensor, outs: list[Tensor]
    ) -> Iterator[tuple[list[Tensor], Parts]]:
        """Yield (outs, parts) of the blocks on this rank's keys; the gradients of the parts need these outs.

        Mostly that is one pair, with all blocks.  In one process "detached" has a pair for each branch, whose out is
        computed again here, as the forward kept only the merged one.
        """
        if not self.branch_outs or self._saved_outs:
            yield outs, self.route.own
            return
        options = self.options._replace(per_branch=True)
        for parts in self.route.own.by_branch():
            branch = no_key_partial(q, v)
            forward_blocks(self.kernel, parts, q, keys, options, [branch])
            if self.options.null_keys is not None:
                self.options.null_keys.add_to(branch, parts[0].branch)
            yield [branch.out], parts

    def _indices(self, step: Round, k: Tensor, v: Tensor) -> RoundIndices:
        """Return the indices of a round on the device of k and v."""
        with_views = not hasattr(self.kernel, "forward_parts")  # such a kernel reads received keys by their index
        kept_bytes = INDEX_SHARE * (k.nbytes + v.nbytes) / len(self.route.rounds)
        return step.indices(k.device, kept_bytes, with_views)

    def _fetch(self, i: int, k: Tensor, v: Tensor) -> tuple[RoundIndices, Tensor, Pending] | None:
        """Start the messages of round `i`; return (indices, received rows, messages), None if there is no such round.

        The received rows are keys and values, (R, B, D + Dv), and valid once the messages were waited for.  `partial`
        calls it for each round, and `gradients` for each round whose rows were not saved.
        """
        if i >= len(self.route.rounds):
            return None
        assert self.remote is not None
        step = self.route.rounds[i]
        indices = self._indices(step, k, v)
        batch, _, _, width = k.shape
        # one copy for all ranks, (R, B, D + Dv), of which each is sent its rows
        sent = torch.cat([x.flatten(1, 2).index_select(1, indices.sent) for x in (k, v)], -1).transpose(0, 1)
        count = sum(map(len, indices.receive.values()))
        received = k.new_empty((count, batch, width + v.shape[3]))
        send, receive = rows_by_rank(sent.contiguous(), indices.send), rows_by_rank(received, indices.receive)
        pending = self.remote.comm.exchange(send, receive, self.remote.message, f"keys and values{_step_text(step)}")
        return indices, received, pending

    def _send_gradients(
        self, step: Round, indices: RoundIndices, dkv_rows: Tensor, dk: Accumulator, dv: Accumulator
    ) -> Callable[[], None]:
        """Start to send dK and dV of a round's received keys home, to the ranks that hold these keys.

        At the same time this rank receives gradients of its own keys, from the ranks to which it sent these.  Returns a
        function that waits for these gradients and adds them to dk and dv.

        Args:
            step, indices: the round, and its rows.
            dkv_rows: (R, B, D + Dv) the gradients of the received rows.
            dk, dv: the accumulators of this rank's own keys.
        """
        assert self.remote is not None
        returned = dkv_rows.new_empty((len(indices.sent), *dkv_rows.shape[1:]))
        send, back = rows_by_rank(dkv_rows, indices.receive), rows_by_rank(returned, indices.send)
        pending = self.remote.comm.exchange(send, back, self.remote.message, f"gradients{_step_text(step)}")

        def finish() -> None:
            """Wait for the gradients of this rank's keys, and add them to dk and dv."""
            pending.wait()
            totals, first = [x.total.flatten(1, 2) for x in (dk, dv)], 0
            for peers in indices.equal_sends:
                rows = indices.send[peers[0]]
                last = first + len(peers) * len(rows)
                gradients = returned[first:last]
                if len(peers) > 1:  # gradients of the same rows are added up first
                    gradients = gradients.unflatten(0, (len(peers), -1)).sum(0)
                parts = gradients.transpose(0, 1).split([x.shape[2] for x in totals], -1)
                for total, part in zip(totals, parts, strict=True):
                    total.index_add_(1, rows, part)
                first = last

        return finish

    def _received_keys(
        self, indices: RoundIndices, kv_rows: Tensor, head_dim: int, gradients: Tensor | None = None
    ) -> Keys:
        """Return the keys of a round as kernels read them: the received rows with their padding, words and tokens.

        Padding, words (of dropout) and tokens are None where no pair depends on them.  Parts with views read the rows
        as rows of one head.

        Args:
            indices: the ranks that the rows came from, and their indices there, token * kv_heads + head.
            kv_rows: (R, B, D + Dv) the R received rows; D is `head_dim`.
            gradients: of the same shape: the backward adds dK and dV of the rows to it.
        """
        assert self.remote is not None
        padding = words = tokens = None
        dropout, masks_later = self.options.dropout, self.options.masks_later
        if self.options.key_padding_mask is not None or dropout is not None or masks_later:
            heads = self.route.kv_heads
            parts = [self.remote.tokens(peer)[peer_rows // heads] for peer, peer_rows in indices.receive.items()]
            tokens = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long, device=kv_rows.device)
            padding = self.remote.padding_of(tokens)
            words = None if dropout is None else dropout.key_words(tokens)
        later = tokens if masks_later else None
        if indices.has_views:
            k, v = rows_of_one_head(kv_rows, head_dim)
            accumulators = None
            if gradients is not None:
                dk, dv = map(Accumulator.over, rows_of_one_head(gradients, head_dim))
                accumulators = dk, dv
            return OwnKeys(k, v, padding, words, later, accumulators)
        sources = tuple(len(peer_rows) for peer_rows in indices.receive.values())
        return ReceivedKeys(kv_rows, head_dim, padding, words, later, gradients, sources, self.route.kv_heads)


def _step_text(step: Round) -> str:
    """Return the ring step for the description of a message: both sides must give the same one.

    The number of a round would differ between ranks, since each leaves out the rounds in which it has no message.
    """
    return f" of ring step {step.ring_step}" if step.ring_step else ""
