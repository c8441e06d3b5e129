"""`Job`: a training run and its ranks, from which a plan is computed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from lightning_longnet.attention.parallel.exchange import Sizes
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.parallel.placement_choice import LayerAttention, PlacementChoice, placement_choice
from lightning_longnet.attention.parallel.rank_blocks import Layout
from lightning_longnet.attention.pattern.pattern import check_heads
from lightning_longnet.planning.devices import compute_dtype
from lightning_longnet.sequence.mesh import checked_sequence_size

if TYPE_CHECKING:
    from lightning_longnet.attention.parallel.placement import Kind
    from lightning_longnet.attention.parallel.schedule import Exchange
    from lightning_longnet.attention.pattern.pattern import Pattern
    from lightning_longnet.models.longnet import LongNetConfig


@dataclass(frozen=True)
class Job:
    """A training run before it is launched.

    Attributes:
        config: the configuration of the model.
        tokens: the number of tokens of a whole sequence.
        batch: the number of sequences of a micro-batch, for each group of ranks that share them.
        nodes: the number of machines.
        per_node: the number of ranks of each.
        sequence_parallel_size: how many ranks share a sequence; all of them by default.
        sharding: the engine; see `RingSequenceParallelStrategy`.
        exchange: the exchange of layers that name none.
        placement: "contiguous" or "zigzag", or "auto", which chooses one of them; see `placement_choice`.
        precision: the `precision` of a Trainer.
        accumulate: the number of micro-batches of a step.
        optimizer_copies: the size of the optimizer's states, as a multiple of the parameters.
        bucket: how many numbers DeepSpeed reduces at a time; by default Lightning's default.
        is_packed: whether rows hold documents, which are shorter than the row and known only to the data.
        is_decoder: whether `config` stands for a model of transformers with the same matrices.
    """

    config: LongNetConfig
    tokens: int
    batch: int = 1
    nodes: int = 1
    per_node: int = 1
    sequence_parallel_size: int | None = None
    sharding: str = "fsdp2"
    exchange: Exchange = "auto"
    placement: Kind | Literal["auto"] = "auto"
    precision: str = "32-true"
    accumulate: int = 1
    optimizer_copies: float = 2.0
    bucket: int = 200_000_000
    is_packed: bool = False
    is_decoder: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "nodes", "per_node", "accumulate"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.config.ordering != "raster":
            raise ValueError(
                f"ordering must be 'raster' in a plan, which does not know what reordering sends and holds, got "
                f"{self.config.ordering!r}"
            )
        if self.config.attention is not None:
            raise ValueError(
                f"attention must be None, the class that is ours, as nothing is known of what another holds and sends, "
                f"got {self.config.attention}"
            )
        size = checked_sequence_size(self.ranks, self.sequence_parallel_size)
        object.__setattr__(self, "sequence_parallel_size", size)
        if self.tokens < size:
            raise ValueError(
                f"sequences must have at least one token for each of the {size} ranks that share them, got "
                f"{self.tokens}: set sequence_parallel_size to at most {self.tokens}"
            )

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    @property
    def shared_by(self) -> int:
        """The number of ranks that share a sequence."""
        assert self.sequence_parallel_size is not None
        return self.sequence_parallel_size

    @property
    def groups(self) -> int:
        """The number of groups of ranks that work on different sequences."""
        return self.ranks // self.shared_by

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products."""
        return compute_dtype(self.precision)

    @property
    def parameter_dtype(self) -> torch.dtype:
        """The dtype of parameters: "mixed" casts them for products only."""
        return torch.float32 if "mixed" in self.precision else self.dtype

    @property
    def placement_choice(self) -> PlacementChoice:
        """The placement of a sequence over the ranks of a group, and why."""
        if self.placement != "auto":
            return PlacementChoice(self.placement, f"{self.placement}: asked for")
        if self.shared_by == 1:
            return PlacementChoice("contiguous", "contiguous: ranks share no sequences")
        heads, kv_heads = self.config.heads, check_heads(self.config.heads, self.config.kv_heads)
        counts = Counter(LayerAttention(pattern, heads, kv_heads) for pattern in self.config.patterns)
        return placement_choice(tuple(counts.items()), self.tokens, self.shared_by)

    def placed(self) -> Placement:
        """Return the placement of a sequence over the ranks of a group."""
        return Placement.even(self.tokens, self.shared_by, self.placement_choice.placement)

    @property
    def most_tokens(self) -> int:
        """The number of tokens of the rank that has most of a sequence."""
        return max(self.placed().lengths)

    def layout(self, pattern: Pattern) -> Layout:
        """Return the layout of a layer's attention over the ranks that share a sequence."""
        heads, kv_heads = self.config.heads, check_heads(self.config.heads, self.config.kv_heads)
        return Layout(pattern, heads, kv_heads, (0, self.tokens), self.placed())

    @property
    def sizes(self) -> Sizes:
        """The sizes of the tensors of a layer's attention."""
        width = self.config.dim // self.config.heads
        wide = torch.promote_types(self.dtype, torch.float32).itemsize
        return Sizes(self.batch, width, width, self.dtype.itemsize, wide)
