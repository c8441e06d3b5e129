"""`SequenceContext`: what layers, modules and callbacks know of the ranks, and of the batch that is worked on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from lightning_longnet.attention.attend import attend
from lightning_longnet.attention.kernels.compiling import not_compiled
from lightning_longnet.attention.parallel.comm import Traffic
from lightning_longnet.attention.parallel.local import local_shard
from lightning_longnet.attention.parallel.placement import Kind, Placement
from lightning_longnet.attention.parallel.schedule import Exchange
from lightning_longnet.sequence.dropout import ContextDropout, DropoutSeeds
from lightning_longnet.sequence.position import MeshPosition
from lightning_longnet.sequence.reductions import Reductions
from lightning_longnet.sequence.shards import ShardCache
from lightning_longnet.sequence.splitter import BatchSplitter
from lightning_longnet.sequence.window import TokenWindow

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from torch.distributed.device_mesh import DeviceMesh

    from lightning_longnet.attention.checks import AttendOptions
    from lightning_longnet.attention.parallel.shard import SequenceShard
    from lightning_longnet.attention.pattern.ordering import Ordering
    from lightning_longnet.attention.pattern.pattern import Pattern
    from lightning_longnet.attention.spec import Mix


class SequenceContext(ContextDropout):
    """The position of a rank among the others, the batch that is worked on, and the operations over ranks.

    Without arguments it is that of one process, or of ranks that split batches alone: sequences are whole there, and
    every method works.  A copy is the same object, as groups cannot be copied.

    Args:
        mesh: a mesh with the axes "data_parallel" and "sequence_parallel"; see `sequence_mesh`.
        placement: "contiguous" or "zigzag": which tokens each rank gets.
        exchange: how keys reach the queries of other ranks, for layers that name no exchange; see `attend`.
        seed: the seed of dropout in steps, the same on all ranks; what attention drops depends on it, on the step and
            on the layer; see `begin_step`.
        position: the position of this rank where there is no mesh to read it from, as in a plan.

    Attributes:
        mesh, placement, exchange, seed, position: as given.
        window: a `TokenWindow`, open where micro-batches are to count by their tokens.
        traffic: what this rank has sent for attention, and how long it waited for others; see `Traffic`.
    """

    def __init__(
        self,
        mesh: DeviceMesh | None = None,
        *,
        placement: Kind = "contiguous",
        exchange: Exchange = "auto",
        seed: int = 0,
        position: MeshPosition | None = None,
    ) -> None:
        for name, value, kinds in (("placement", placement, Kind), ("exchange", exchange, Exchange)):
            allowed = get_args(kinds)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        self.mesh, self.placement, self.exchange, self.seed = mesh, placement, exchange, seed
        self.position = MeshPosition.of(mesh) if position is None else position
        self.window, self.traffic = TokenWindow(), Traffic()
        self._splitter = BatchSplitter(self.position, placement)
        self._shards = ShardCache(self._splitter, self.traffic)
        self._reductions = Reductions(self._splitter, self.window, self.traffic)
        self._seeds = DropoutSeeds()

    def __deepcopy__(self, _: Any) -> SequenceContext:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SequenceContext, ()  # in another process there is no such mesh

    # The batch

    def split(self, batch: Any, sequence_dims: Mapping[str, int | None] | None = None) -> Any:
        """Return this rank's part of a batch that all ranks of the sequence group hold whole, and begin the batch.

        A `SequencePart` is such a part already, and becomes a dictionary.

        Args:
            batch: tensors in dictionaries, lists, tuples and dataclasses; or a `SequencePart`.
            sequence_dims: for each name the dimension that is the sequence, or None for a tensor that has none.
                input_ids, labels, attention_mask, positions and documents are known, and transformers' shift_labels and
                position_ids.  Where all tensors have None the batch stays whole, and the model makes the sequences; see
                `begin_sequences`.
        """
        return self._splitter.split(batch, sequence_dims)

    def begin(self, length: int | None) -> None:
        """Give layers their part of sequences of `length` tokens from now on; whole sequences where it is None."""
        self._splitter.begin(length)

    def begin_sequences(self, length: int) -> Tensor:
        """Begin a batch whose sequences the model makes itself from inputs that all ranks of a group hold, as images.

        Returns the positions of the tokens that this rank is to make: all of them inside `whole()`.
        """
        return self._splitter.begin_sequences(length)

    def begin_made(self, length: int) -> Tensor:
        """Call `begin_sequences`, of which this is the former name."""
        return self.begin_sequences(length)

    def whole(self) -> AbstractContextManager[None]:
        """Give layers whole sequences inside the block, each rank its own: to generate text in a callback, say."""
        return self.parts_of(None)

    def parts_of(self, length: int | None) -> AbstractContextManager[None]:
        """Give layers their part of sequences of `length` tokens inside the block, and restore the batch after it."""
        return self._splitter.parts_of(length)

    def with_documents(self, documents: Tensor | None) -> AbstractContextManager[None]:
        """Give the attention of transformers' models these documents of whole sequences inside the block.

        It is for steps whose batch nobody splits: `split` keeps the documents of its batch, and then this changes
        nothing.

        Args:
            documents: (N,) or (B, N), the id of each token's document; None where each row is one document.
        """
        return self._splitter.with_documents(documents)

    def check_same(self, batch: Any, sequence_dims: Mapping[str, int | None] | None = None) -> None:
        """Raise a ValueError on all ranks where those that share sequences hold different batches, or unfit ones."""
        self._splitter.check_same(batch, sequence_dims)

    def fault_of(self, batch: Any, sequence_dims: Mapping[str, int | None] | None = None) -> str:
        """Return why a batch cannot be split, or an empty string."""
        return self._splitter.fault_of(batch, sequence_dims)

    @property
    def samples(self) -> tuple[str, ...]:
        """The names of the batch's samples, where the data gives them."""
        return self._splitter.samples

    @property
    def repeated_samples(self) -> int:
        """The number of the last samples of a batch of validation or test are repeats, and count on another rank.

        A sampler repeats samples whose number does not divide over the groups, as all need equally many batches.
        """
        return self._splitter.repeated

    @repeated_samples.setter
    def repeated_samples(self, samples: int) -> None:
        self._splitter.repeated = samples

    @property
    def is_split(self) -> bool:
        """Whether layers get parts of sequences now."""
        return self._splitter.is_split

    @property
    def length(self) -> int | None:
        """The number of tokens of the batch's whole sequences, where it is known."""
        return self._splitter.current.length

    @property
    def positions(self) -> Tensor | None:
        """The positions of this rank's tokens in the whole sequence; None where the length is unknown."""
        return self._splitter.positions

    @property
    def documents(self) -> Tensor | None:
        """The document ids of this rank's tokens, where the current batch has documents."""
        return self._splitter.current.documents

    @property
    def key_padding_mask(self) -> Tensor | None:
        """A mask, True where a token of this rank is padding; None if the current batch has no attention_mask."""
        return self._splitter.current.key_padding_mask

    def positions_of(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return `positions` on the device of x, whose dimension `dim` is the sequence; never None."""
        return self._splitter.positions_of(x, dim)

    def placement_of(self, length: int) -> Placement:
        """Return the placement of sequences of `length` tokens: as even as can be."""
        return self._splitter.placement_of(length)

    # Attention

    @property
    def shard(self) -> SequenceShard | None:
        """The `shard` for calls of `attend` on the batch's tokens, with the batch's documents and attention_mask.

        All ranks of the sequence group make it together, at the first use in a batch.  It has the masks that the batch
        had when it was split, on one process too; it is None where sequences are whole and the batch has no masks.

        Only the context of a batch that was split knows its masks.  Under Lightning's own strategies, and wherever no
        batch was begun, this raises a ValueError.  `attend` of the context, which is given the masks, is right
        everywhere.
        """
        current = self._splitter.current
        documents, padding = current.documents, current.key_padding_mask
        if not current.is_begun:
            raise ValueError(
                "shard must be that of a batch that was split, got none: the masks of this batch are not known here. "
                "Call context.attend(q, k, v, pattern, documents=..., key_padding_mask=...) of this context, which is "
                "right under any strategy and without one"
            )
        if documents is None and padding is None:
            return self.shard_of() if self.is_split else None
        if current.shard is None:
            current.shard = self._shards.make(documents, padding) if self.is_split else local_shard(documents, padding)
        return current.shard

    def shard_of(self, documents: Tensor | None = None, key_padding_mask: Tensor | None = None) -> SequenceShard:
        """Return the shard with these documents and this padding of this rank's tokens, in a split batch.

        One shard serves all calls with the same tensors, until one is changed in place on some rank.  All ranks of the
        sequence group call it together: with masks they compare the indices of their shards.
        """
        return self._shards.get(documents, key_padding_mask)

    @not_compiled
    def once(self, mask: Tensor, into: str, convert: Callable[[], Tensor]) -> Tensor:
        """Return `convert()` of a mask, computed once in a batch, so that layers which convert it share a shard."""
        return self._splitter.current.shards.once(mask, into, convert)

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
        layer: int | None = None,
        scale: float | None = None,
        sinks: Tensor | None = None,
        softcap: float | None = None,
        mix: Mix = "exact",
        kernel: str = "auto",
        exchange: Exchange | None = None,
        ordering: Ordering = "raster",
    ) -> Tensor:
        """Call `attend` on whole sequences or on parts, as they are in the current batch.

        This is the way to call `attend` that is the same under our strategy, under any other and without one.
        `documents` and `key_padding_mask` are those of the tokens that q, k and v have on this rank, out of the batch
        that it was given; without them there are none.

        `layer` is the number of this attention in the model.  It is required where `dropout` is positive: in a step
        that was begun, calls with equal numbers drop the same pairs.  See `begin_step` for calls outside of steps.
        """
        options = self.attend_options(
            q.shape[1], documents, key_padding_mask, dropout=dropout, layer=layer, exchange=exchange
        )
        options |= {"scale": scale, "sinks": sinks, "softcap": softcap}
        options |= {"mix": mix, "kernel": kernel, "ordering": ordering}
        return attend(q, k, v, pattern, **options)

    def attend_options(
        self,
        tokens: int,
        documents: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        *,
        dropout: float = 0.0,
        layer: int | None = None,
        exchange: Exchange | None = None,
    ) -> AttendOptions:
        """Return the arguments of `attend` that depend on the ranks, on the current batch and on the step.

        All ranks that share sequences call it together.  `tokens` is the number of tokens of q on this rank; the other
        arguments are those of the method `attend`.
        """
        options: AttendOptions = {"dropout": dropout}
        if dropout > 0:
            if layer is None:
                raise ValueError(
                    "layer must be the number of this attention in the model where dropout is positive, such as "
                    "layer=0, layer=1, ...: in a step, calls with equal numbers drop the same pairs. Got None"
                )
            options["dropout_seed"] = self._seeds.of_layer(layer)
            options["dropout_samples"] = self.data_parallel_rank, self.data_parallel_size
        if not self.is_split:
            return {**options, "documents": documents, "key_padding_mask": key_padding_mask}
        shard = self._shard_for(tokens, documents, key_padding_mask)
        if dropout > 0 and options["dropout_seed"] is None:
            options["dropout_seed"] = _shared_seed(shard)
        return {**options, "shard": shard, "exchange": self.exchange if exchange is None else exchange}

    @not_compiled
    def _shard_for(self, tokens: int, documents: Tensor | None, key_padding_mask: Tensor | None) -> SequenceShard:
        """Return the shard of a call on so many tokens of this rank; outside of compiled graphs, as ranks make it."""
        self._splitter.check_tokens(tokens)
        return self.shard_of(documents, key_padding_mask)

    @not_compiled
    def places_of(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the positions of the tokens of x (B, L, ...) in their documents, (L,) or (B, L), in a split batch."""
        self._splitter.check_tokens(x.shape[1])
        return self.shard_of(documents).places.to(x.device)

    # Losses and metrics

    def token_mean(self, loss_sum: Tensor, token_count: Tensor | float) -> Tensor:
        """Return the mean over the tokens of all ranks, of a sum of losses and a count of tokens on each of them.

        It is the same number on all ranks, and its gradient is right wherever gradients are averaged over all ranks, as
        DDP, FSDP and DeepSpeed do.  0 where there is no token anywhere.
        """
        return self._reductions.token_mean(loss_sum, token_count)

    def gather_sequence(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return whole sequences, in their order, out of the parts that the ranks hold; differentiable.

        Where every rank then computes the same loss, gradients averaged over all ranks are right.
        """
        return self._reductions.gather_sequence(x, dim)

    def sum_parts(self, x: Tensor) -> Tensor:
        """Return the sum of x over the ranks that share sequences; differentiable.

        As with `gather_sequence`, every rank then computes the same loss.
        """
        return self._reductions.sum_parts(x)

    def per_sample(self, metric: Any) -> Any:
        """Make a torchmetrics Metric or MetricCollection count each sample once, and return it.

        Ranks that share a sequence all see its samples; without this each of them counts.
        """
        metrics = [child for child in metric.modules() if hasattr(child, "dist_sync_fn")]
        if not metrics:
            raise ValueError(f"metric must be a torchmetrics Metric or a collection of them, got {metric!r}")
        for child in metrics:  # a copy of the metric must find this context, and not a copy of it
            child.dist_sync_fn = self.gather_samples
        return metric

    def gather_samples(self, x: Tensor, group: Any = None) -> list[Tensor]:
        """Return the x of each rank that works on other samples, of any lengths: a `dist_sync_fn` for torchmetrics."""
        return self._reductions.gather_samples(x, group)


@not_compiled
def _shared_seed(shard: SequenceShard) -> Tensor:
    """Return the seed that the first rank of a shard draws; all ranks draw one, so that generators stay in step."""
    own = int(torch.randint(-(2**63), 2**63 - 1, (), device="cpu"))
    return torch.tensor(shard.exchange_value(own, "agrees on a seed")[0], device="cpu")
