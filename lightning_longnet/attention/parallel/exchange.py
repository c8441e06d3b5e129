"""The interfaces that each exchange between ranks implements: its plan, its calls, and what `longnet plan` counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from lightning_longnet.attention.kernels import BLOCK_KERNELS
from lightning_longnet.attention.kernels.null_keys import NullKeys
from lightning_longnet.attention.kernels.pair_options import PairOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_longnet.attention.kernels import BlockKernel, PartsKernel
    from lightning_longnet.attention.kernels.dropout import Dropout
    from lightning_longnet.attention.parallel.comm import Direction, MessageContext
    from lightning_longnet.attention.parallel.rank_blocks import Layout
    from lightning_longnet.attention.parallel.shard import SequenceShard
    from lightning_longnet.attention.pattern.lines import Line
    from lightning_longnet.attention.plan.block import Part
    from lightning_longnet.attention.spec import AttentionSpec

# The price of a message before its first byte, in bytes that could have travelled meanwhile: 20 us at 10 GB/s
MESSAGE_BYTES = 200_000


class Sizes(NamedTuple):
    """The sizes of a call's tensors: samples, head_dim, the width of v, and the bytes of an element and of a sum.

    A sum is accumulated in float32 or float64: its bytes are `wide_itemsize`.

    `distributed_calls` makes it of the tensors of a call, `sequence_plan` and the planner's `Job` of planned ones.
    Plans compute bytes with it.
    """

    batch: int
    head_dim: int
    value_dim: int
    itemsize: int
    wide_itemsize: int


class Volume(NamedTuple):
    """The bytes and messages that one rank sends in a forward and its backward, and what it keeps between them.

    It is of one call of attention, so of one layer.  `ExchangePlan.volume` returns it, and `rounds_volumes`.

    Attributes:
        sent_bytes, messages: of the forward and the backward together.
        kept_bytes: the bytes of the keys and values of other ranks, or of whole heads, that are saved for the backward.
        forward_bytes: what of `sent_bytes` the forward sends.  Layers that are recomputed in the backward send it
            twice, which `longnet plan` and `CommunicationMonitor` add.
    """

    sent_bytes: int
    messages: int
    kept_bytes: int
    forward_bytes: int

    @property
    def cost(self) -> int:
        """The bytes that are sent, and for each message `MESSAGE_BYTES` more: what `schedule` compares."""
        return self.sent_bytes + self.messages * MESSAGE_BYTES


class RoundWork(NamedTuple):
    """The number of KV rows that a rank receives in one round, by source, and the blocks that it computes with them.

    A `RankWork` of gather and ring has one for each round, also for one in which the rank only sends.  `saves_rows`
    is that of the `Round`: whether the rows are saved for the backward.
    """

    received: dict[int, int]
    parts: tuple[Part, ...]
    saves_rows: bool


class RankWork(NamedTuple):
    """What a rank computes and receives in a forward; `ExchangePlan.work` returns it.

    Attributes:
        own: the blocks on keys that no round brings.  With "swap" these are the blocks of its heads over the whole
            sequence.
        received: the number of KV rows that come from each other rank, in all rounds or by the all_to_all.
        rounds: the rounds of gather and ring.
    """

    own: tuple[Part, ...]
    received: dict[int, int]
    rounds: tuple[RoundWork, ...] = ()

    @property
    def visible_pairs(self) -> int:
        """The pairs that the rank's queries see in all its heads, a repeated pair as often as branches show it.

        If the pattern's multiplicity is "set", it counts once.

        `sequence_plan` puts them into its table.
        """
        parts = (*self.own, *(part for round_ in self.rounds for part in round_.parts))
        return sum(part.block.pairs * part.block.weight for part in parts)


class Footprint(Protocol):
    """The memory that an exchange takes on a rank beside its own q, k, v and results.

    `longnet plan` counts with it, and attention on fake tensors allocates what it says.
    """

    @property
    def saves_inputs(self) -> bool:
        """The same as `ExchangeCall.saves_inputs`: autograd on fake tensors then keeps no q, k and v.

        `PlannedShard.saves_inputs` returns it.
        """

    def saved(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> list[Tensor]:
        """Return uninitialized tensors like those that `ExchangeCall.forward` returns last, for the backward.

        `_fake_forward` of op.py calls it, the forward on fake tensors.
        """

    def kv_rows(self, layers: int) -> int:
        """Return the most KV rows of other ranks that are in memory at once, in a model of `layers` such layers.

        `_fullest` of planning/run.py compares ranks by it, to find the one with the fullest memory.
        """

    def in_flight_bytes(self, q: Tensor, k: Tensor, v: Tensor, *, is_backward: bool) -> int:
        """Return the most bytes of messages, sent and received, in memory while one forward or backward runs.

        `_in_flight` of planning/fake_rank.py adds them to the memory of the call, for `longnet plan`.
        """


class ExchangeCall(Protocol):
    """One forward or one backward of attention on this rank, for samples with the same documents.

    The operators of op.py get it from `unsharded_call` or `distributed_calls`, and call `forward` or `backward`, where
    B are these samples.  A call without masks, dropout and sinks is kept, and used again.  The backward has an object
    of its own, to which `saved` brings what the forward saved.  A `ReorderedCall`, `JoinedCall` or `AllToAllCall`
    contains another call, whose `forward` or `backward` it calls.
    """

    @property
    def saves_inputs(self) -> bool:
        """Whether `saved` holds all inputs of the backward, which then reads only the shapes of q, k and v.

        The operators of op.py ask, so that autograd does not save them as well.
        """

    @property
    def saved_count(self) -> int:
        """The number of tensors that the forward saves for the backward.

        The operator of the backward gives each call its own of the tensors that all calls have saved.
        """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return out (B, L, H, Dv) in the type of q, lse (B, H, L), and what else the backward needs.

        q is (B, L, H, D), k (B, L, Hkv, D) and v (B, L, Hkv, Dv); lse is in float32, or float64 as q.
        """

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, saved: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv of the tokens on this rank, of the shapes of q, k and v.

        `out` and `lse` are those of the forward, and `saved` what it returned besides.
        """


class PassOptions(NamedTuple):
    """The options of one forward or backward of attention; the operators of op.py make them.

    Attributes:
        spec: the options of the call of `attend`.
        direction: "forward" or "backward".
        dropout: the rule that drops pairs, or None.
        sinks: (H,) one more logit of the softmax for each query head, or None.
        head_dim: the width of q and k.
    """

    spec: AttentionSpec
    direction: Direction
    dropout: Dropout | None
    sinks: Tensor | None
    head_dim: int


class RankCall(NamedTuple):
    """The arguments of a call on this rank besides its tensors; `ExchangePlan.call` takes it.

    `distributed_calls` makes it for each group of samples with equal documents.

    Attributes:
        shard: the tokens on this rank.
        message: what its messages belong to.
        options: the options of this forward or backward.
        samples: the samples of the batch, all with the same documents.
        weighted_segments: up to how many segments a pair that several branches show is computed once; see `plan`.
        device: the device of the tensors.
        key: what distinguishes the layouts of a shard's calls from one another, for `SequenceShard.cached`; `by_line`
            adds the pattern of the line.
        lines: the lines on which the pattern is drawn; the call takes its rows in the order of the first one.
    """

    shard: SequenceShard
    message: MessageContext
    options: PassOptions
    samples: slice
    weighted_segments: int
    device: torch.device
    key: tuple[Any, ...]
    lines: tuple[Line, ...]

    @property
    def kernel(self) -> BlockKernel | PartsKernel:
        """The kernel that computes blocks, by the name in the spec; never "reference", which serves no shard.

        `RoundsPlan` and `AllToAllPlan` give it to their `RoundsCall`s.
        """
        return BLOCK_KERNELS[self.options.spec.kernel]

    @property
    def line(self) -> Line:
        """The first of `lines`, in whose order the call takes its rows.

        In the calls that `by_line` returns it is the only one: `RoundsPlan` and `AllToAllPlan` plan each by its line.
        """
        return self.lines[0]

    @property
    def branch_outs(self) -> int:
        """The number of branches of this line whose own results the backward takes: all for "detached", else 0.

        `RoundsPlan` and `AllToAllPlan` give it to their `RoundsCall`s.
        """
        return len(self.line.branches) if self.options.spec.partials > 1 else 0

    def by_line(self) -> list[RankCall]:
        """Return a call for each line, with the branches of that line alone and its rows in that line's order.

        `RoundsPlan.call` and `AllToAllPlan.call` split a call so.
        """
        calls = []
        for line in self.lines:
            context = self.message
            if len(self.lines) > 1:
                context = context._replace(description=f"{context.description}, branches {line.branches}")
            calls.append(self._replace(lines=(line,), message=context, key=(line.pattern, *self.key)))
        return calls

    def tokens_at(self, places: Tensor) -> Tensor:
        """Return the index in the whole sequence of the token at each of the `places` of the line, on their device.

        Both are (N,).  Without a curve a place is the index itself.  `pair_options` asks for the keys that no round
        brings, and `RoundsPlan` for those of other ranks.
        """
        if self.line.tokens is None:
            return places
        key = "line", *self.key, self.line.branches, places.device
        return self.shard.cached(key, partial(self.line.tokens.to, places.device))[places]

    def _numbers(self) -> Tensor:
        """Return the numbers of the samples, (B,), by which dropout knows them."""
        return torch.arange(self.samples.start, self.samples.stop, device=self.device)

    def pair_options(self, layout: Layout, places: Tensor, heads: slice = slice(None)) -> PairOptions:
        """Return the options that hold for every pair of the call, whichever block computes it.

        `RoundsPlan` calls it for this rank's rows of a line, and `AllToAllPlan` for the whole sequences of its heads.

        Args:
            layout: the pattern, the heads, the documents and the placement.
            places: (N,) the place on the line of each key that is not received in a round.
            heads: the query heads that this rank computes.
        """
        spec, sinks = self.options.spec, self.options.sinks
        tokens, null_keys = self.tokens_at(places), None
        if layout.pattern.has_null_keys:
            null_keys = NullKeys(layout.pattern, layout.cuts, places, layout.heads, layout.kv_heads, heads)
        return PairOptions(
            spec.scale_of(self.options.head_dim),
            self.shard.padding_of(tokens, self.samples),
            self.options.dropout,
            samples=self._numbers() if self.options.dropout is not None else None,
            tokens=tokens,
            first_head=heads.start or 0,
            counts_once=spec.counts_once,
            branches=self.line.branches,
            masks_later=self.line.masks_later,
            sinks=None if sinks is None else sinks[heads],
            softcap=spec.softcap,
            null_keys=null_keys,
        )


@dataclass(frozen=True)
class ExchangePlan(ABC):
    """An exchange of keys between ranks: a pure function of the layout, equal on all ranks.

    `exchange_plan` makes it of the choice of `schedule`: `RoundsPlan` is gather and ring, `AllToAllPlan` is swap.

    Args:
        layout: the pattern, the heads, the documents and the placement.
        exchanges: the exchange of each branch, from the finest to the coarsest.
    """

    layout: Layout
    exchanges: tuple[str, ...]

    @property
    @abstractmethod
    def overlaps(self) -> bool:
        """Whether blocks are computed while messages are on their way.

        `longnet plan` then counts only the time for which a rank waits.  Its `_share` of planning/exchange.py reads
        this property, and calls `branch_volumes`, `work` and `footprint` too.
        """

    @abstractmethod
    def volume(self, rank: int, sizes: Sizes) -> Volume:
        """Return what a rank sends, forward and backward, and keeps.

        `schedule` compares "swap" with other exchanges by it (those by `rounds_volumes`); `sequence_plan`, `longnet
        plan`, and the callbacks `CommunicationMonitor` and `MemoryMonitor` report it.
        """

    @abstractmethod
    def branch_volumes(self, rank: int, sizes: Sizes) -> tuple[Volume, ...]:
        """Return what each branch, from the finest on, adds to the `volume` of those finer than it.

        The tuple is empty where no message is of one branch.  `longnet plan` and the callback `CommunicationMonitor`
        report it.
        """

    @abstractmethod
    def work(self, rank: int, weighted_segments: int = 0) -> RankWork:
        """Return what a rank computes and receives in a forward, for `sequence_plan` and the planner.

        `weighted_segments` is that of `make_plan`: with 0 each branch that shows a repeated pair computes it.
        """

    @abstractmethod
    def footprint(self, rank: int) -> Footprint:
        """Return the memory that a call of the exchange takes on a rank beside its own tensors.

        `_share` of planning/exchange.py asks, for `longnet plan` and for the strategy's check of memory.
        """

    @abstractmethod
    def call(self, call: RankCall) -> ExchangeCall:
        """Return the object that computes one forward or backward on this rank, with the branches of all lines.

        It sends nothing yet.  `distributed_calls` calls it in each forward and backward, once for each group of samples
        with equal documents.
        """
