"""The attention of a `SequenceContext`: the shards of the current batch, and calls of `attend` on its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_longnet.attention.attend import attend
from lightning_longnet.attention.kernels.compiling import not_compiled
from lightning_longnet.attention.parallel.local import local_shard
from lightning_longnet.sequence.dropout import ContextDropout

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_longnet.attention.parallel.schedule import Exchange
    from lightning_longnet.attention.parallel.shard import SequenceShard
    from lightning_longnet.attention.pattern.ordering import Ordering
    from lightning_longnet.attention.pattern.pattern import Pattern
    from lightning_longnet.attention.prepared import AttendOptions
    from lightning_longnet.attention.spec import Mix
    from lightning_longnet.sequence.shards import ShardCache


class ContextAttention(ContextDropout):
    """The attention of a `SequenceContext`.

    Attributes:
        exchange: how keys reach the queries of other ranks, in calls that name no exchange.
    """

    exchange: Exchange
    _shards: ShardCache

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
            return self.shard_of() if self._splitter.is_split else None
        if current.shard is None:
            current.shard = (
                self._shards.make(documents, padding) if self._splitter.is_split else local_shard(documents, padding)
            )
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

        As in `torch.nn.functional.scaled_dot_product_attention`, a positive `dropout` drops in evaluation too: in a
        module write `attend(q, k, v, pattern, dropout=p if self.training else 0.0, layer=i)`.  `layer` is the number of
        this attention in the model.  It is required where `dropout` is positive: in a step that was begun, calls with
        equal numbers drop the same pairs.  See `begin_step` for calls outside of steps.
        """
        if self._splitter.is_split:
            self._check_layout(q)
        options = self.attend_options(
            q.shape[1], documents, key_padding_mask, dropout=dropout, layer=layer, exchange=exchange
        )
        options |= {"scale": scale, "sinks": sinks, "softcap": softcap}
        options |= {"mix": mix, "kernel": kernel, "ordering": ordering}
        return attend(q, k, v, pattern, **options)

    @not_compiled
    def _check_layout(self, q: Tensor) -> None:
        """Raise a ValueError where the heads of q come before its tokens, as torch's attention has them."""
        here, shape = self._splitter.local_length, tuple(q.shape)
        if len(shape) == 4 and shape[1] != here and shape[2] == here:
            raise ValueError(
                f"q must be (batch, tokens, heads, head_dim), got {shape}, whose tokens are in dimension 2: leave out "
                f"transpose(1, 2)"
            )

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
                    "layer must be the number of this attention in the model where dropout is positive, as in "
                    "attend(..., dropout=p if self.training else 0.0, layer=i): in a step, calls with equal numbers "
                    "drop the same pairs. Got None"
                )
            options["dropout_seed"] = self._seeds.of_layer(layer)
            options["dropout_samples"] = self.data_parallel_rank, self.data_parallel_size
        if not self._splitter.is_split:
            return {**options, "documents": documents, "key_padding_mask": key_padding_mask}
        shard = self._shard_for(tokens, documents, key_padding_mask)
        if dropout > 0 and options["dropout_seed"] is None:
            options["dropout_seed"] = _shared_seed(shard)
        return {**options, "shard": shard, "exchange": self.exchange if exchange is None else exchange}

    @not_compiled
    def _shard_for(self, tokens: int, documents: Tensor | None, key_padding_mask: Tensor | None) -> SequenceShard:
        """Return the shard of a call whose q has `tokens` tokens on this rank.

        A compiled graph breaks here, as ranks send messages to make a shard.
        """
        self._splitter.check_tokens(tokens)
        return self.shard_of(documents, key_padding_mask)

    @not_compiled
    def places_of(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the positions of the tokens of x (B, L, ...) in their documents, (L,) or (B, L), in a split batch."""
        self._splitter.check_tokens(x.shape[1])
        return self.shard_of(documents).places.to(x.device)


@not_compiled
def _shared_seed(shard: SequenceShard) -> Tensor:
    """Return the seed that the first rank of a shard draws; all ranks draw one, so that generators stay in step."""
    own = int(torch.randint(-(2**63), 2**63 - 1, (), device="cpu"))
    return torch.tensor(shard.exchange_value(own, "agrees on a seed")[0], device="cpu")
