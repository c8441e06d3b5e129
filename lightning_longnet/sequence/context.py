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

    `RingSequenceParallelStrategy` makes one when the ranks are connected, attaches it to the module and begins the
    batches and steps.  A training loop without the strategy does this itself, with `attach_context`, `split` and
    `begin_step`.  Without arguments, it is the context of one process, or of ranks that share no sequences: sequences
    are whole, and every method works.  A copy is the same object, because process groups cannot be copied.

    Args:
        mesh: a mesh with the axes "data_parallel" and "sequence_parallel"; see `sequence_mesh`.
        placement: "contiguous" or "zigzag": which tokens each rank gets.  Or a function that returns one of them for a
            number of tokens and a number of ranks, the same on all ranks; see `choose_placement`.
        exchange: how keys reach the queries of other ranks, for layers that name no exchange; see `attend`.
        seed: the seed of dropout in steps, the same on all ranks; what attention drops depends on it, on the step and
            on the layer; see `begin_step`.
        position: the position of this rank where there is no mesh to read it from, as when memory is planned.

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

        The strategy calls it for each batch that Lightning moves to the device, the split check in its own runs, and a
        training loop without the strategy before each forward.  It sends nothing.  Layers then work on parts of these
        sequences, until the next batch.  A `SequencePart` is a part already, and becomes a dictionary.

        Args:
            batch: tensors in dictionaries, lists, tuples and dataclasses; or a `SequencePart`.
            sequence_dims: for each name the dimension that is the sequence, or None for a tensor that has none.
                input_ids, labels, attention_mask, positions and documents are known, and transformers' shift_labels and
                position_ids.  Where all tensors have None the batch stays whole, and the model makes the sequences; see
                `begin_sequences`.
        """
        return self._splitter.split(batch, sequence_dims)

    def begin(self, length: int | None) -> None:
        """Begin a batch of sequences of `length` tokens that the caller has split itself, without its masks.

        Layers expect this rank's tokens of them from now on; None lets them take whole sequences of any length.  The
        strategy calls it with None at the end of each loop.
        """
        self._splitter.begin(length)

    def begin_sequences(self, length: int) -> Tensor:
        """Begin a batch whose sequences the model itself makes, and return the positions of this rank's tokens.

        A model calls it in its forward, as `LongViT` does, where all ranks of a sequence group have the same inputs,
        such as images, and each makes its own tokens, such as patches.  The positions are (L,), in the order in which
        the rank holds its tokens; inside `whole()` they are those of all `length` tokens.
        """
        return self._splitter.begin_sequences(length)

    def begin_made(self, length: int) -> Tensor:
        """Return `begin_sequences(length)`, of which this is the former name."""
        return self.begin_sequences(length)

    def whole(self) -> AbstractContextManager[None]:
        """Return a context manager in which layers take whole sequences, and each rank computes on its own.

        It is for inputs that are not split, as when a callback or a model generates text: `GenerateSamples`,
        `CausalLMModule.generate` and generation with a cache enter it.  At its end the batch is the one before.
        """
        return self.parts_of(None)

    def parts_of(self, length: int | None) -> AbstractContextManager[None]:
        """Return a context manager in which layers take parts of sequences of `length` tokens, or whole ones for None.

        At its end the batch is the one before.  Generation without a cache, `embed` and the scoring of texts
        (`TextStates`) use it for sequences beside the batch; the caller takes this rank's tokens of them, those at
        `positions`.
        """
        return self._splitter.parts_of(length)

    def with_documents(self, documents: Tensor | None) -> AbstractContextManager[None]:
        """Return a context manager in which the attention of transformers' models separates these documents.

        These models have no argument for documents.  `whole_documents` of huggingface enters it for steps whose batch
        is not split, as under another strategy; in a split batch it changes nothing, as `split` has kept the documents
        of the batch.

        Args:
            documents: (N,) or (B, N), the id of each token's document; None if each row is one document.
        """
        return self._splitter.with_documents(documents)

    def check_same(self, batch: Any, sequence_dims: Mapping[str, int | None] | None = None) -> None:
        """Raise a ValueError on all ranks if ranks that share sequences hold unequal batches, or one cannot be split.

        All ranks call it together before `split`: a training loop without the strategy does, and the strategy's
        `LoaderWatch` for the first batch of a loop where no ranks share sequences.  It reads all values of the batch.
        Without a mesh it does nothing.  It warns if several data-parallel groups hold the same batch.
        """
        self._splitter.check_same(batch, sequence_dims)

    def fault_of(self, batch: Any, sequence_dims: Mapping[str, int | None] | None = None) -> str:
        """Return the error message for a batch that cannot be split over the ranks; "" if it can be split.

        It sends nothing to other ranks: the strategy's `LoaderWatch`, which asks for each batch, does, so that all of
        them raise the error.
        """
        return self._splitter.fault_of(batch, sequence_dims)

    @property
    def samples(self) -> tuple[str, ...]:
        """The names of the batch's samples, where it was a `SequencePart`; else an empty tuple.

        `NonFiniteGuard` names a batch by them.
        """
        return self._splitter.samples

    @property
    def repeated_samples(self) -> int:
        """How many samples at the end of a validation or test batch are repeats, which metrics are to leave out.

        A distributed sampler repeats samples if their number does not divide over the data-parallel groups, as all
        groups need equally many batches.  Another group has the same samples, and counts them.  The strategy sets the
        number for each batch; the metrics of `TokenModule` and `LongViTModule` read it.
        """
        return self._splitter.repeated

    @repeated_samples.setter
    def repeated_samples(self, samples: int) -> None:
        self._splitter.repeated = samples

    @property
    def is_split(self) -> bool:
        """Whether layers get parts of sequences now: of a batch that was begun, where several ranks share sequences.

        Layers, models of transformers, generation, callbacks and the split check ask.
        """
        return self._splitter.is_split

    @property
    def length(self) -> int | None:
        """The number N of tokens of the batch's whole sequences; None if no batch was begun or it is not known.

        `TokenThroughput`, `check_is_split` of the strategy and the split check read it, and models that warn of gaps.
        """
        return self._splitter.current.length

    @property
    def positions(self) -> Tensor | None:
        """The positions of this rank's tokens in the whole sequence, (L,) on the CPU; None if `length` is None.

        Modules of users read it, and generation and `embed` inside `parts_of`.
        """
        return self._splitter.positions

    @property
    def documents(self) -> Tensor | None:
        """The document ids of this rank's tokens, (L,) or (B, L); None if the current batch has no documents.

        "ring" attention of transformers' models reads it, as these models have no argument for documents.
        """
        return self._splitter.current.documents

    @property
    def key_padding_mask(self) -> Tensor | None:
        """(B, L), True where a token of this rank is padding; None if the current batch has no attention_mask.

        "ring" attention of transformers' models reads it, and compares it with the mask that the model was given.
        """
        return self._splitter.current.key_padding_mask

    def positions_of(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return the positions in the whole sequence of the tokens along dimension `dim` of x, (L,), on its device.

        Models of users call it in place of `torch.arange`, and "ring" attention of transformers' models.  For whole
        sequences of any length it returns `torch.arange`.
        """
        return self._splitter.positions_of(x, dim)

    def placement_of(self, length: int) -> Placement:
        """Return which tokens of a sequence of `length` tokens each rank of the sequence group holds.

        The ranks hold equally many tokens, or some of them one more.  Datasets that make a `SequencePart` call it, as
        those of this package's data modules, the callbacks `RunReport` and `TokenThroughput`, and the split check.
        """
        return self._splitter.placement_of(length)

    def kind_of(self, length: int) -> Kind:
        """Return whether `placement_of(length)` is "contiguous" or "zigzag"; the split check asks for its message."""
        return self._splitter.kind_of(length)

    # Losses and metrics

    def token_mean(self, loss_sum: Tensor, token_count: Tensor | float) -> Tensor:
        """Return the mean loss over the tokens of all ranks: the sum of all `loss_sum` over that of all `token_count`.

        A training step returns it as the loss, as those of `TokenModule` and `LongViTModule` do.  All ranks call it
        together and get the same number, without dimensions; it is 0 if no rank has a token.  Its gradient is right if
        gradients are averaged over all ranks, as DDP, FSDP and DeepSpeed do.

        Args:
            loss_sum: the sum of the losses of this rank's tokens, without dimensions.
            token_count: the number of these tokens.
        """
        return self._reductions.token_mean(loss_sum, token_count)

    def gather_sequence(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return whole sequences with all N tokens in order, of which dimension `dim` of x has this rank's tokens.

        It is differentiable.  Models of users call it, on all ranks of the sequence group together, for what needs all
        tokens, such as a pooled output, and `whole_prompts` for the prompts of a split batch.  If every rank then
        computes the same loss, gradients averaged over all ranks are right.  Whole sequences are returned as they are.
        """
        return self._reductions.gather_sequence(x, dim)

    def sum_parts(self, x: Tensor) -> Tensor:
        """Return the sum of x over the ranks that share sequences, which call it together; differentiable.

        Models call it for sums over tokens, as `LongViT` for its pooled output.  The gradient is the sum of the ranks'
        gradients, which is right if every rank computes the same loss and gradients are averaged over all ranks, as
        after `gather_sequence`.  If sequences are whole, x is returned.
        """
        return self._reductions.sum_parts(x)

    def per_sample(self, metric: Any) -> Any:
        """Make a torchmetrics Metric or MetricCollection count each sample once, and return it.

        A user's module calls it when it makes the metric for values of samples.  All ranks that share a sequence update
        the metric with the same samples, and torchmetrics by itself would add up the states of all of them.
        """
        metrics = [child for child in metric.modules() if hasattr(child, "dist_sync_fn")]
        if not metrics:
            raise ValueError(f"metric must be a torchmetrics Metric or a collection of them, got {metric!r}")
        for child in metrics:  # a copy of the metric must find this context, and not a copy of it
            child.dist_sync_fn = self.gather_samples
        return metric

    def gather_samples(self, x: Tensor, group: Any = None) -> list[Tensor]:
        """Return the x of one rank of each data-parallel group, as a list; their sizes may differ.

        `per_sample` gives it to metrics as their `dist_sync_fn`, which torchmetrics calls on all ranks together to
        gather the states.

        Args:
            x: the state of this rank.
            group: the group of torchmetrics, which is used only if the context has no mesh.
        """
        return self._reductions.gather_samples(x, group)
