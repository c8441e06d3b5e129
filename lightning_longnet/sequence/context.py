"""`SequenceContext`: what layers, modules and callbacks know about the ranks and the current batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from lightning_longnet.attention.parallel.comm import Traffic
from lightning_longnet.attention.parallel.placement import Kind, Placement
from lightning_longnet.attention.parallel.schedule import Exchange
from lightning_longnet.sequence.attention import ContextAttention
from lightning_longnet.sequence.dropout import DropoutSeeds
from lightning_longnet.sequence.position import MeshPosition
from lightning_longnet.sequence.reductions import Reductions
from lightning_longnet.sequence.shards import ShardCache
from lightning_longnet.sequence.splitter import BatchSplitter
from lightning_longnet.sequence.window import TokenWindow

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

    from lightning_longnet.sequence.splitter import PlacementRule


class SequenceContext(ContextAttention):
    """The position of a rank among the others, the current batch, and the operations over ranks.

    Without arguments, it is the context of one process, or of ranks that share no sequences: sequences are whole, and
    every method works.  A copy is the same object, because groups cannot be copied.

    Args:
        mesh: a mesh with the axes "data_parallel" and "sequence_parallel"; see `sequence_mesh`.
        placement: "contiguous" or "zigzag": which tokens each rank gets.  Or a function that returns one of them for a
            number of tokens and a number of ranks, the same on all ranks; see `choose_placement`.
        exchange: how keys reach the queries of other ranks, for layers that name no exchange; see `attend`.
        seed: the seed of dropout in steps, the same on all ranks; what attention drops depends on it, on the step and
            on the layer; see `begin_step`.
        position: the position of this rank where there is no mesh to read it from, as in a plan.

    Attributes:
        mesh, placement, exchange, seed, position: as given.
        token_window: a `TokenWindow`, open where micro-batches are to count by their tokens.
        traffic: what this rank has sent for attention, and how long it waited for others; see `Traffic`.
    """

    def __init__(
        self,
        mesh: DeviceMesh | None = None,
        *,
        placement: Kind | PlacementRule = "contiguous",
        exchange: Exchange = "auto",
        seed: int = 0,
        position: MeshPosition | None = None,
    ) -> None:
        for name, value, kinds in (("placement", placement, Kind), ("exchange", exchange, Exchange)):
            allowed = get_args(kinds)
            if value not in allowed and not (name == "placement" and callable(value)):
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        self.mesh, self.placement, self.exchange, self.seed = mesh, placement, exchange, seed
        self.position = MeshPosition.of(mesh) if position is None else position
        self.token_window, self.traffic = TokenWindow(), Traffic()
        self._splitter = BatchSplitter(self.position, placement)
        self._shards = ShardCache(self._splitter, self.traffic)
        self._reductions = Reductions(self._splitter, self.token_window, self.traffic)
        self._seeds = DropoutSeeds()

    @property
    def window(self) -> TokenWindow:
        """The `token_window`, under its former name."""
        return self.token_window

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
        """How many samples at the end of a validation or test batch are repeats, which count on another rank.

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

    def kind_of(self, length: int) -> Kind:
        """Return the kind of that placement, "contiguous" or "zigzag"."""
        return self._splitter.kind_of(length)

    # Losses and metrics

    def token_mean(self, loss_sum: Tensor, token_count: Tensor | float) -> Tensor:
        """Return the mean loss over the tokens of all ranks: the sum of all `loss_sum` over that of all `token_count`.

        All ranks call it together and get the same number; it is 0 if no rank has a token.  Its gradient is right if
        gradients are averaged over all ranks, as DDP, FSDP and DeepSpeed do.
        """
        return self._reductions.token_mean(loss_sum, token_count)

    def gather_sequence(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return whole sequences, their tokens in order, out of the parts that the ranks hold; differentiable.

        Dimension `dim` of x is this rank's tokens.  Models call it for what needs all tokens, such as a pooled output.
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
