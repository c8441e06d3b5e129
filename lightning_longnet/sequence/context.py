"""Where this rank stands while sequences are split: handed down to layers by whoever made the mesh."""

from __future__ import annotations

from contextlib import contextmanager
from functools import lru_cache
from time import perf_counter
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_longnet.attention.attend import attend
from lightning_longnet.attention.kernels.dropout import hashed
from lightning_longnet.attention.parallel.comm import Traffic
from lightning_longnet.attention.parallel.placement import Kind, Placement
from lightning_longnet.attention.parallel.schedule import Exchange
from lightning_longnet.attention.parallel.shard import SequenceShard
from lightning_longnet.sequence.agreement import compare, fault_of
from lightning_longnet.sequence.batches import checked_dims, digest, dim_of, is_whole, known_length, length_of, mapped
from lightning_longnet.sequence.mesh import DATA, SEQUENCE
from lightning_longnet.sequence.parts import SequencePart
from lightning_longnet.sequence.reductions import (
    GatheredSequence,
    SummedParts,
    TokenMean,
    gathered_states,
    part_of,
    summed,
)
from lightning_longnet.sequence.shards import BatchShards
from lightning_longnet.sequence.window import TokenWindow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch.distributed.device_mesh import DeviceMesh

    from lightning_longnet.attention.checks import Mix
    from lightning_longnet.attention.guard import Guard
    from lightning_longnet.attention.pattern.pattern import Pattern


class SequenceContext:
    """Where a rank stands among the others, and the batch that is being worked on.

    Made of nothing it stands for one process, or for ranks that split batches alone: sequences are whole there, and all
    that it offers works.  A copy is the same object, as groups cannot be copied.

    Args:
        mesh: with the axes "data_parallel" and "sequence_parallel"; see `sequence_mesh`.
        placement: "contiguous" or "zigzag": which tokens a rank is given.
        exchange: how keys reach the queries of other ranks, for layers that say nothing of it; see `attend`.
        seed: of attention dropout, the same on all ranks: what is dropped depends on it, on the step and the layer.

    Attributes:
        mesh: as given.
        sequence_group: the ranks that share this rank's sequences; None where they are whole.
        data_parallel_group: the ranks that hold the same part of other sequences; None without a mesh.
        samples: the names of the samples that are worked on, where the data tells them.
        window: opened where micro-batches are to count by their tokens.
        traffic: what this rank has sent for attention, and how long it waited for others; see `Traffic`.
    """

    def __init__(
        self,
        mesh: DeviceMesh | None = None,
        *,
        placement: Kind = "contiguous",
        exchange: Exchange = "auto",
        seed: int = 0,
    ) -> None:
        for name, value, kinds in (("placement", placement, Kind), ("exchange", exchange, Exchange)):
            allowed = get_args(kinds)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        self.mesh, self.placement, self.exchange, self.seed = mesh, placement, exchange, seed
        self.sequence_parallel_size, self.sequence_parallel_rank = 1, 0
        self.data_parallel_size, self.data_parallel_rank = 1, 0
        if mesh is not None:
            for axis in (DATA, SEQUENCE):
                setattr(self, f"{axis}_size", mesh[axis].size())
                setattr(self, f"{axis}_rank", mesh[axis].get_local_rank())
        self.sequence_group = None if mesh is None else mesh.get_group(SEQUENCE)
        self.data_parallel_group = None if mesh is None else mesh.get_group(DATA)
        self._length: int | None = None
        self._is_whole = False
        self._given: tuple[Tensor | None, Tensor | None] = None, None
        self._shards = BatchShards()
        self._plain: dict[int, SequenceShard] = {}
        self._batches = 0
        self._step_seed = torch.tensor(seed)
        self.window = TokenWindow()
        self.traffic = Traffic()
        self.samples: tuple[str, ...] = ()

    def __deepcopy__(self, _: Any) -> SequenceContext:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SequenceContext, ()  # in another process there is no such mesh

    # The batch

    def split(self, batch: Any, sequence_dims: Mapping[str, int | None] | None = None) -> Any:
        """The part of this rank, of a batch that all ranks of the sequence group hold whole; `begin`s it, too.

        A `SequencePart` is that part already, and becomes a dictionary.

        Args:
            batch: tensors in dictionaries, lists, tuples and dataclasses; or a `SequencePart`.
            sequence_dims: of each name the dimension that is the sequence, or None for a tensor that has none.
                input_ids, labels, attention_mask, positions and documents are known.  Where all tensors have None the
                batch stays whole, and the model makes the sequences; see `begin_made`.
        """
        dims = checked_dims(sequence_dims or {})
        self.samples = ()
        self._batches += 1
        if isinstance(batch, SequencePart):
            self._check_part(batch, dims)
            self.begin(batch.length)
            self.samples = batch.samples
            if self.is_split:
                self._give(batch.tensors)
            return dict(batch.tensors)
        if self.sequence_parallel_size == 1:
            self.begin(known_length(batch, dims))
            return batch
        length = self._length_of(batch, dims)
        self.begin(length)
        if length is None:
            return batch
        placement = self.placement_of(length)
        given: dict[str, Tensor] = {}

        def part(path: tuple[str, ...], x: Tensor) -> Tensor:
            dim = dim_of(path, x, dims)
            if dim is None:
                return x
            found = part_of(x, placement, self.sequence_parallel_rank, dim)
            given.setdefault(path[-1], found)
            return found

        batch = mapped(batch, part)
        self._give(given)
        return batch

    def _give(self, parts: Mapping[str, Tensor]) -> None:
        """What the batch's own shard is made with."""
        mask = parts.get("attention_mask")
        self._given = parts.get("documents"), None if mask is None else mask == 0

    def begin(self, length: int | None) -> None:
        """From now on layers are given their part of sequences of `length` tokens; whole ones where it is None."""
        self._length = length
        self._given = None, None
        self._shards = BatchShards()

    def begin_made(self, length: int) -> Tensor:
        """As `begin`, by a model that makes sequences itself of what all ranks of a group hold whole: images' patches.

        Gives back where the tokens stand that this rank is to make of them: within `whole()`, all.
        """
        if self._is_whole:
            return torch.arange(length)
        self._check_length(length)
        self.begin(length)
        return _tokens(self.placement_of(length), self.sequence_parallel_rank)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """In here layers are given whole sequences, on each rank its own: to generate text in a callback, say."""
        with self.parts_of(None):
            yield

    @contextmanager
    def parts_of(self, length: int | None) -> Iterator[None]:
        """In here layers are given their part of sequences of so many tokens, and then what they were given before."""
        kept = self._length, self._given, self._shards, self._is_whole
        self.begin(length)
        self._is_whole = length is None
        try:
            yield
        finally:
            self._length, self._given, self._shards, self._is_whole = kept

    def check_same(self, batch: Any, sequence_dims: Mapping[str, int | None] | None = None) -> None:
        """A ValueError on all ranks where those that share sequences hold different batches, or one cannot be split."""
        if self.sequence_group is None or self.data_parallel_group is None:
            return
        fault, dims = "", checked_dims(sequence_dims or {})
        if isinstance(batch, SequencePart):
            fault = fault_of(lambda: self._check_part(batch, dims))
        elif self.sequence_parallel_size > 1:
            fault = fault_of(lambda: (self._length_of(batch, dims), mapped(batch, lambda _, x: x)))
        place = self.data_parallel_rank, self.data_parallel_size
        compare(digest(batch), fault, self.sequence_group, self.data_parallel_group, place)

    def _check_part(self, part: SequencePart, dims: Mapping[str, int | None]) -> None:
        self._check_length(part.length)
        part.check(self.placement_of(part.length), self.sequence_parallel_rank)
        if (tokens := length_of(part.tensors, dims)) != part.tokens:
            raise ValueError(f"a SequencePart of {part.tokens} tokens must have as many in its tensors, got {tokens}")

    def _length_of(self, batch: Any, dims: Mapping[str, int | None]) -> int | None:
        if is_whole(batch, dims):
            return None
        length = length_of(batch, dims)
        self._check_length(length)
        return length

    def _check_length(self, length: int) -> None:
        if length < self.sequence_parallel_size:
            raise ValueError(
                f"sequences must have at least one token for each of the {self.sequence_parallel_size} ranks that "
                f"share them, got {length}: set sequence_parallel_size to at most {length}, or pad them"
            )

    @property
    def is_split(self) -> bool:
        """Do layers get parts of sequences now?"""
        return self._length is not None and self.sequence_parallel_size > 1

    @property
    def length(self) -> int | None:
        """Tokens of the whole sequences of this batch, where they are known."""
        return self._length

    @property
    def positions(self) -> Tensor | None:
        """Where this rank's tokens stand in the whole sequence; None where nobody has split a batch."""
        if self._length is None:
            return None
        return _tokens(self.placement_of(self._length), self.sequence_parallel_rank)

    def positions_of(self, x: Tensor, dim: int = 1) -> Tensor:
        """As `positions`, on the device of x, whose dimension `dim` is the sequence; always there."""
        if not self.is_split:
            return torch.arange(x.shape[dim], device=x.device)
        positions = self.positions
        assert positions is not None
        self._check_tokens(x.shape[dim])
        return positions.to(x.device)

    # Attention

    @property
    def shard(self) -> SequenceShard | None:
        """For `attend`: with the documents and the attention_mask of the batch; None where sequences are whole.

        All ranks of the sequence group make it together, at the first use in a step.
        """
        return self.shard_of(*self._given) if self.is_split else None

    def shard_of(self, documents: Tensor | None = None, key_padding_mask: Tensor | None = None) -> SequenceShard:
        """With these, which are of the tokens that are here.  One shard serves all calls with the same tensors."""
        assert self._length is not None
        assert self.sequence_group is not None
        here = self.placement_of(self._length).lengths[self.sequence_parallel_rank]
        if documents is None and key_padding_mask is None:  # such a shard lasts, whatever the batch
            if self._length not in self._plain:
                if len(self._plain) == 64:
                    self._plain.clear()
                self._plain[self._length] = self._counted(SequenceShard(self.sequence_group, here, self.placement))
            shard = self._plain[self._length]
            shard.begin_batch(self._batches)
            return shard
        settings = self.sequence_group, here, self.placement, documents, key_padding_mask
        return self._shards.of(documents, key_padding_mask, lambda: self._counted(SequenceShard(*settings)))

    def _counted(self, shard: SequenceShard) -> SequenceShard:
        self.traffic.waited_seconds += shard.comm.traffic.waited_seconds  # for the others, who make it, too
        self.traffic.flight_seconds += shard.comm.traffic.flight_seconds
        shard.comm.traffic = self.traffic
        return shard

    def once(self, mask: Tensor, into: str, convert: Callable[[], Tensor]) -> Tensor:
        """What became of this very mask in this batch, so that layers which convert it alike share a shard."""
        return self._shards.once(mask, into, convert)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern,
        *,
        documents: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        dropout: float = 0.0,
        layer: int = 0,
        mix: Mix = "exact",
        kernel: str = "auto",
        exchange: Exchange | None = None,
        guard: Guard | None = None,
    ) -> Tensor:
        """`attend` for whole sequences and for parts: documents and padding are of the tokens that are here.

        `layer` tells apart what the layers of a model drop; one that is called twice in a step drops the same twice.
        """
        settings: dict[str, Any] = {"dropout": dropout, "mix": mix, "kernel": kernel}
        if dropout > 0:
            settings["dropout_seed"] = hashed(self._step_seed + layer)
            settings["dropout_samples"] = self.data_parallel_rank, self.data_parallel_size
        if not self.is_split:
            settings |= {"documents": documents, "key_padding_mask": key_padding_mask}
            if guard is not None:
                guarded: Tensor = guard.attend(q, k, v, pattern, is_placed=self.mesh is not None, **settings)
                return guarded
            whole: Tensor = attend(q, k, v, pattern, **settings)
            return whole
        settings["exchange"] = self.exchange if exchange is None else exchange
        part: Tensor = self._attend_part(q, k, v, pattern, documents, key_padding_mask, settings, guard)
        return part

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _attend_part(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern,
        documents: Tensor | None,
        key_padding_mask: Tensor | None,
        settings: dict[str, Any],
        guard: Guard | None,
    ) -> Tensor:
        self._check_tokens(q.shape[1])
        shard = self.shard_of(documents, key_padding_mask)
        if guard is not None:
            guarded: Tensor = guard.attend(q, k, v, pattern, shard=shard, **settings)
            return guarded
        out: Tensor = attend(q, k, v, pattern, shard=shard, **settings)
        return out

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def places_of(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """Where the tokens of x (B, L, ...) stand in their documents, (L,) or (B, L), while sequences are split."""
        self._check_tokens(x.shape[1])
        return self.shard_of(documents).places.to(x.device)

    # Losses and metrics

    def token_mean(self, loss_sum: Tensor, token_count: Tensor | float) -> Tensor:
        """The mean over the tokens of all ranks: a sum of losses here, and of how many tokens.

        It is the same number on all ranks, and its gradient is right wherever gradients are averaged over all ranks, as
        DDP, FSDP and DeepSpeed do.  0 where there is no token anywhere.
        """
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        begin = perf_counter()
        totals = summed(loss_sum, token_count, group)
        self.traffic.loss_seconds += perf_counter() - begin
        ranks = 1 if group is None else dist.get_world_size()
        divisor = self.window.divisor(totals[1]) if loss_sum.requires_grad else totals[1]
        mean: Tensor = TokenMean.apply(loss_sum, totals, divisor, ranks)  # type: ignore[no-untyped-call]
        return mean

    def gather_sequence(self, x: Tensor, dim: int = 1) -> Tensor:
        """Whole sequences, in their order, out of the parts that the ranks hold; differentiable.

        Where every rank then computes the same loss, gradients averaged over all ranks are right.
        """
        if not self.is_split:
            return x
        assert self._length is not None
        dim %= x.dim()
        self._check_tokens(x.shape[dim])
        told = self.placement_of(self._length), self.sequence_parallel_rank, self.sequence_group, dim
        whole: Tensor = GatheredSequence.apply(x, *told)  # type: ignore[no-untyped-call]
        return whole

    def sum_parts(self, x: Tensor) -> Tensor:
        """The sum of what the ranks that share sequences have each of its own part; differentiable.

        As with `gather_sequence`, every rank then computes the same loss.
        """
        if not self.is_split:
            return x
        found: Tensor = SummedParts.apply(x, self.sequence_group)  # type: ignore[no-untyped-call]
        return found

    def per_sample(self, metric: Any) -> Any:
        """The same torchmetrics Metric or MetricCollection, for what counts samples and not tokens.

        Ranks that share a sequence all see its samples; it then counts them once.
        """
        found = [each for each in metric.modules() if hasattr(each, "dist_sync_fn")]
        if not found:
            raise ValueError(f"metric must be a torchmetrics Metric or a collection of them, got {metric!r}")
        for each in found:
            each.dist_sync_fn = self.gather_samples
        return metric

    def gather_samples(self, x: Tensor, group: Any = None) -> list[Tensor]:
        """What torchmetrics wants of `dist_sync_fn`: a state of each rank that has other samples, of any lengths."""
        if self.data_parallel_group is not None:
            group = self.data_parallel_group
        elif group is None:
            group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        return [x] if group is None else gathered_states(x, group)

    # Steps

    def begin_step(self, number: int) -> None:
        """The number of a micro-batch since training began, which attention dropout follows."""
        self._step_seed = hashed(hashed(torch.tensor(self.seed)) + number)

    def placement_of(self, length: int) -> Placement:
        """Of sequences of so many tokens: as evenly as can be."""
        return Placement.even(length, self.sequence_parallel_size, self.placement)

    def _check_tokens(self, tokens: int) -> None:
        assert self._length is not None
        here = self.placement_of(self._length).lengths[self.sequence_parallel_rank]
        if tokens != here:
            raise ValueError(
                f"this rank holds {here} tokens of each sequence of {self._length}, got {tokens}: layers are given "
                f"parts while a batch is worked on; for whole sequences, `with sequence_context(module).whole():`"
            )


@lru_cache(16)
def _tokens(placement: Placement, rank: int) -> Tensor:
    parts = [torch.arange(begin, end) for begin, end, _ in placement.stretches(rank)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
