"""`SequenceShard`: one rank's view of a batch whose sequences are split over the ranks of a group."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cached_property
from hashlib import sha256
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from lightning_longnet.attention.parallel.agreement import all_gather_integers, all_gather_text
from lightning_longnet.attention.parallel.comm import Comm
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.parallel.shard_header import (
    ShardHeader,
    argument_fault,
    check_headers,
    placement_fault,
)
from lightning_longnet.attention.plan.documents import change_points, cuts_of, run_lengths_of, runs_on_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from lightning_longnet.attention.parallel.agreement import Step
    from lightning_longnet.attention.parallel.exchange import Footprint
    from lightning_longnet.attention.parallel.placement import Kind
    from lightning_longnet.attention.parallel.shard_header import Check
    from lightning_longnet.attention.spec import AttentionSpec

# Shards by their number, since an operator's schema takes no objects.  The references are weak: the callers and the
# autograd graph keep a shard alive
SHARDS: WeakValueDictionary[int, SequenceShard] = WeakValueDictionary()
_numbers = count()
_CALLS = 2**20  # more calls than a batch has

Made = TypeVar("Made")


class SequenceShard:
    """The tokens of each sequence that are on this rank, and the documents and padding of the whole batch.

    All ranks of the group make it together, once for each layout of a batch; arguments that do not fit raise an error
    on all of them.  `attend` takes it as `shard`.

    Args:
        group: the ranks that share the sequences; None is all of them.
        length: tokens of each sequence on this rank; 0 is allowed.
        placement: "contiguous" or "zigzag"; see `Placement`.  Or the placement of `balanced_placement`, equal on all
            ranks.
        documents: the ids of this rank's tokens, (L,) or (B, L), not decreasing along the whole sequence.
        key_padding_mask: (B, L), True where a key is masked for all queries.
        check: "first" compares the arguments of all ranks (shapes, type, pattern and options) at the first call of
            each kind, which costs later calls nothing; "always" compares every call, so that a difference is never
            left to the group's timeout.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        length: int,
        placement: Kind | Placement = "contiguous",
        documents: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        check: Check = "first",
    ) -> None:
        self.comm = self._make_comm(group)
        self.rank = self.comm.rank
        # a rank with a wrong argument still exchanges headers, so that all ranks raise an error
        fault = placement_fault(self.comm, length, placement)
        fault = fault or argument_fault(self.rank, length, placement, documents, key_padding_mask, check)
        runs = [None if x is None or fault else run_lengths_of(x) for x in (documents, key_padding_mask)]
        self.number = register_shard(self)
        header = ShardHeader.of(length, placement, runs, check, self.number, fault)
        headers = [
            ShardHeader(*values[: len(header)])
            for values in all_gather_integers(self.comm, [*header], "makes a shard", fault)
        ]
        check_headers(headers, fault)
        lengths = tuple(h.length for h in headers)
        self.placement = placement if isinstance(placement, Placement) else Placement(lengths, placement)
        self.threads = max(h.threads for h in headers)
        self.comm.shard = headers[0].number  # ranks number their shards differently: all use the first rank's number
        ids = self._whole_runs(runs[0], max(h.document_runs for h in headers))
        padding = self._whole_runs(runs[1], max(h.padding_runs for h in headers))
        self.cuts = [(0, self.length)] if ids is None else [cuts_of(row, self.length) for row in ids]
        self._borders = None if padding is None else [change_points(row) for row in padding]
        self.key_padding_mask = key_padding_mask
        self.calls = 0
        self._check = check
        self._known: set[tuple[Any, ...]] = set()
        self._cache: dict[tuple[Any, ...], Any] = {}
        self.saves_inputs_of: dict[str, bool] = {}  # by the text of the spec; see `saves_inputs`

    @staticmethod
    def _make_comm(group: dist.ProcessGroup | None) -> Comm:
        """Return the messages of this rank in a group, or raise a ValueError if the group does not hold it."""
        group = dist.group.WORLD if group is None else group
        if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
            raise ValueError(
                f"group must be a process group that holds this rank, {dist.get_rank()} of all, got {group!r}: every "
                f"rank makes its shard with the group that it is in"
            )
        return Comm(group)

    @property
    def length(self) -> int:
        """The number N of tokens of a whole sequence; op.py, `AllToAllPlan` and `TokenThroughput` read it."""
        return self.placement.length

    @staticmethod
    def call_of(calls: int) -> str:
        """Return the name of a call, equal on all ranks, from the value of `calls` after it had begun.

        `distributed_calls` names a forward and its backward so in errors and message tags, the operators of op.py for
        `Comm.whole_call`, and `check` where it compares.
        """
        batch, number = divmod(calls - 1, _CALLS)
        return f"call {number} of batch {batch}" if batch else f"call {number}"

    def tokens(self, rank: int | None = None, device: torch.device | None = None) -> Tensor:
        """Return the index in the whole sequence of each token of a rank, (L,), in the order in which it holds them.

        By default the rank is this one, and the indices are on the CPU; no message is sent.  Callers of `attend` select
        their part by it: `q[:, shard.tokens()]`.  Along a curve the same numbers are the places on the line that the
        rank holds after reordering.  `RoundsPlan` asks for this rank and for those from which keys come, `row_exchange`
        and `_sequence_order` for all ranks, and `places` for this one.
        """
        chunks = self.placement.chunks(self.rank if rank is None else rank)
        parts = [torch.arange(chunk.begin, chunk.end, device=device) for chunk in chunks]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long, device=device)

    @cached_property
    def places(self) -> Tensor:
        """The index of each token on this rank in its document: (L,), or (B, L) where rows have their own documents.

        `ContextAttention.places_of` returns it for the positions of models, such as rotary ones, and `_split_tokens`
        compares it with the position_ids of a model of transformers.
        """
        tokens = self.tokens()
        begins = [torch.tensor(cuts[:-1]) for cuts in self.cuts]
        rows = [tokens - starts[torch.searchsorted(starts, tokens, right=True) - 1] for starts in begins]
        if not rows:
            return tokens.new_empty(0, len(tokens))
        return rows[0] if len(rows) == 1 else torch.stack(rows)

    def padding_of(self, tokens: Tensor, samples: slice) -> Tensor | None:
        """Return (B, tokens), True where padding masks a token, whichever rank holds it; None without padding.

        `RankCall.pair_options` asks for the keys of a call, and the `RemoteRows` of a round for received ones.

        Args:
            tokens: indices in the whole sequence.
            samples: the indices of the samples.
        """
        if self._borders is None:
            return None
        borders = self.cached(("borders", tokens.device), lambda: [b.to(tokens.device) for b in self._borders or ()])
        masks = [torch.searchsorted(b, tokens, right=True) % 2 == 1 for b in borders[samples]]
        return torch.stack(masks)

    def cached(self, key: tuple[Any, ...], make: Callable[[], Made]) -> Made:
        """Return the value of a key, made at its first use; it lives as long as the shard.

        `distributed_calls`, `RankCall`, `RoundsPlan` and `AllToAllPlan` keep exchanges, routes and indices here, so
        that later steps with the same shard plan nothing.
        """
        if key not in self._cache:
            self._cache[key] = make()
        value: Made = self._cache[key]
        return value

    def saves_inputs(self, spec: str) -> bool:
        """Return whether calls with this spec save other inputs than q, k and v, which autograd then need not save.

        `spec` is the text of `AttentionSpec.dumps`.  `_setup_context` of op.py asks after the forward.
        """
        return self.saves_inputs_of.get(spec, False)

    def footprint(self, spec: AttentionSpec) -> Footprint:
        """Return the memory of a call on fake tensors.  Only the shards of `longnet plan` know it and override this.

        `_fake_forward` of op.py asks, and `_in_flight` of planning/fake_rank.py.  This one raises a
        NotImplementedError.
        """
        raise NotImplementedError("attention over ranks runs on real tensors; longnet plan runs it on fake ones")

    def check(self, call: Mapping[str, Any], extra: Mapping[str, Any] | None = None, fault: str = "") -> None:
        """Begin a call and compare it with those of all ranks; a difference raises a ValueError on each that names it.

        `_attend_part` calls it on all ranks before each call of the operator.  A rank that has an error instead calls
        it with the `fault`, in `report_errors`, in `Guard.preflight` and in the ancestor's `RingAttention`.

        Args:
            call: values by their names.  Calls with equal values are one kind, which is compared once, with
                check="always" each time.
            extra: more values to compare, which do not distinguish kinds.
            fault: an error that this rank raises itself.  The others get it where they compare, and the call counts:
                they must not take the rank's next call for this one.
        """
        self.calls += 1
        kind = tuple(call.items())
        if self._check == "first" and (kind in self._known or (fault and self._known)):
            return
        shared = {"number of the shard": self.comm.shard, "place among the calls": self.call_of(self.calls)}
        values = {**shared, **call, **(extra or {})}
        digests = [int.from_bytes(sha256(str(value).encode()).digest()[:7], "big") for value in values.values()]
        everywhere = all_gather_integers(self.comm, digests, "compares a call", fault)
        if fault:
            return
        for i, (name, value) in enumerate(values.items()):
            if others := [r for r, theirs in enumerate(everywhere) if theirs[i] != everywhere[0][i]]:
                # all ranks get here, as they compare the same digests
                shown = all_gather_text(self.comm, repr(value), "compares a call")
                got = f"{shown[0]} on rank 0 and {shown[others[0]]} on rank {others[0]}"
                raise ValueError(f"{name} must be equal on all ranks of a shard, got {got}")
        self._known.add(kind)

    def begin_batch(self, number: int) -> None:
        """Number the next calls as those of batch `number`, if one shard serves many batches.

        A rank may abandon a batch between two calls and continue with the next one.  The other ranks then wait until
        the timeout, instead of taking its next call for the one that they wait for.  `ShardCache` calls it for each
        batch.
        """
        self.calls = max(self.calls, number * _CALLS)

    def exchange_verdicts(self, verdicts: Sequence[int], fault: str = "") -> list[list[int]]:
        """Return the verdicts of all ranks, by rank; all ranks call it together.

        A `Guard` calls it in its preflight: a rank's verdicts are 1 for each kernel that fails there, else 0, and then
        1 if its memory is short.  A rank with a `fault` raises an error itself; the others then raise one that names
        the rank.
        """
        everywhere = all_gather_integers(self.comm, list(verdicts), "agrees on kernels", fault)
        return [theirs[: len(verdicts)] for theirs in everywhere]

    def exchange_value(self, value: int, step: Step, fault: str = "") -> list[int]:
        """Return the 64-bit integer of each rank; all ranks call it together, for the same step.

        A rank with a `fault` raises an error itself; the others then raise one that names the rank.  `step` is what
        they agree on: `_shared_seed` on the seed of dropout, `BatchShards.get` on a shard, and `_split_tokens` on the
        positions that a model of transformers is given.
        """
        return [theirs[0] for theirs in all_gather_integers(self.comm, [value], step, fault)]

    def _whole_runs(self, own: list[Tensor] | None, width: int) -> list[list[tuple[int, int]]] | None:
        """Return for each row of the batch the runs (value, count) along the whole sequence; None if `own` is None.

        All ranks call it together when they make the shard, once for documents and once for padding.

        Args:
            own: for each row the runs on this rank, (runs, 2).
            width: the largest number of runs of a row on any rank.
        """
        if own is None:
            return None
        padded = torch.zeros(len(own), width, 2, dtype=torch.int64)
        for row, runs in zip(padded, own, strict=True):
            row[: len(runs)] = runs
        everywhere = self.comm.all_gather(padded, "shares its documents and padding")
        whole = []
        for row in range(len(own)):
            placed: list[tuple[int, int, int]] = []
            for rank in range(self.placement.ranks):
                placed += runs_on_rank(everywhere[rank, row].tolist(), self.placement, rank)
            whole.append([(value, count) for _, value, count in sorted(placed)])
        return whole


def register_shard(shard: SequenceShard) -> int:
    """Register a shard in `SHARDS` and return its number, which the operators of op.py take in place of the shard.

    The reference is weak, and ranks have different numbers.  The constructors of `SequenceShard` and of its subclass
    `PlannedShard`, which does not call the former, register the shard that they make.
    """
    number = next(_numbers)
    SHARDS[number] = shard
    return number


@contextmanager
def report_errors(shard: SequenceShard | None) -> Iterator[None]:
    """Report an error of the block to the ranks that wait where calls are compared, and raise it here as well.

    `attend` checks its arguments in such a block, and a `Guard` raises its error there if no kernel is left.  With
    `shard` None it reports nothing.
    """
    try:
        yield
    except (ValueError, RuntimeError, MemoryError) as error:
        if isinstance(shard, SequenceShard):
            shard.check({}, fault=str(error) or repr(error))
        raise
