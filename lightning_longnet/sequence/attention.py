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
    """The part of `SequenceContext`, its only subclass, that computes attention over the current batch.

    Attributes:
        exchange: how keys reach the queries of other ranks, in calls that name no exchange.
    """

    exchange: Exchange
    _shards: ShardCache

    @property
    def shard(self) -> SequenceShard | None:
        """The argument `shard` for calls of the function `attend` on this rank's tokens of the current batch.

        It holds the documents and the attention_mask that the batch had when `split` was called, also in a single
        process.  It is None if sequences are whole and the batch has neither.  All ranks of the sequence group read
        this attribute together: the first time in a batch they exchange messages to make the shard.  Modules of
        users that call the function `attend` read it, and the callback `TokenThroughput` for the documents of whole
        rows.

        A ValueError is raised where no batch was begun, as under Lightning's own strategies, because its masks are not
        known.  The method `attend`, whose caller gives the masks, can be called everywhere.
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
        """Return the `SequenceShard` of a split batch for these documents and this padding of this rank's tokens.

        All ranks of the sequence group call it together, as a new shard takes messages between them.  `attend_options`
        and `places_of` call it for each layer, the property `shard` for a batch without masks, `_split_tokens` for
        models of transformers, and `RingAttention` of compat to report a refused argument to the other ranks.  Without
        masks all batches of one length share a shard.  With masks, calls in a batch with the same tensors share one
        until a tensor is changed in place on some rank.

        Args:
            documents: (L,) or (B, L), the document ids of this rank's L tokens; None if each row is one document.
            key_padding_mask: (B, L), True where a token is padding; None if none is.
        """
        return self._shards.get(documents, key_padding_mask)

    @not_compiled
    def once(self, mask: Tensor, into: str, convert: Callable[[], Tensor]) -> Tensor:
        """Return `convert()`, which converts a mask; the result is cached for the rest of the batch.

        Layers that take masks in another form than `attend` call it: `MultiheadDilatedAttention`, and "ring"
        attention of transformers' models (`_split_tokens`) for position_ids.  All layers then give one tensor to
        `shard_of`, and so share one shard; a new tensor for each would need a new shard.  Each rank converts its own
        mask.

        Args:
            mask: the mask as the layer was given it.
            into: the name of the conversion, for masks that are converted in several ways.
            convert: computes the converted mask.
        """
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
        """Return the attention of q to k and v, as the function `attend` does, in whole or in split sequences.

        A user's module calls it in its forward, and `ring_attention` for models of transformers: the call is the same
        under this package's strategy, under any other and without one.  All ranks that share sequences call it
        together.  q is (B, L, H, D), where L is the number of tokens of this rank: all N of them where sequences are
        whole; the result is (B, L, H, Dv).  `documents`, (L,) or (B, L), and `key_padding_mask`, (B, L), are those of
        the same tokens; None means that there are none, even if the batch has some.

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
        """Raise a ValueError if q is (B, H, L, D), as torch's attention takes it, instead of (B, L, H, D)."""
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
        """Return the keyword arguments of the function `attend` that depend on the ranks, the batch and the step.

        These are the masks or the shard that holds them, the exchange, and the dropout with its seed.  The method
        `attend` and the attention layers of this package (`AttentionLayer._attended`) call it before each call of the
        function.  All ranks that share sequences call it together, as it may make a shard.

        Args:
            tokens: the number of tokens of q on this rank.
            documents, key_padding_mask, dropout, layer, exchange: those of the method `attend`.
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
        """Return the shard for a call of `attend`, after checking that q has as many tokens as this rank holds.

        `torch.compile` breaks the graph here, as ranks send messages to make a shard.
        """
        self._splitter.check_tokens(tokens)
        return self.shard_of(documents, key_padding_mask)

    @not_compiled
    def places_of(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the index of each token of x in its document, counted from 0 at the first token of the document.

        `places_of` of layers/attending.py calls it for layers with rotary or learned positions, on all ranks of the
        sequence group together, in a split batch.

        Args:
            x: (B, L, ...), with the L tokens of this rank in dimension 1.
            documents: (L,) or (B, L), their document ids; None if each row is one document.

        Returns:
            Integers on the device of x, (L,), or (B, L) if the rows have different documents.
        """
        self._splitter.check_tokens(x.shape[1])
        return self.shard_of(documents).places.to(x.device)


@not_compiled
def _shared_seed(shard: SequenceShard) -> Tensor:
    """Return the seed that the first rank of a shard draws, as a 0-dimensional int64 tensor on the CPU.

    `attend_options` calls it on all ranks together, for dropout outside of a step.  Each rank draws a number, and those
    of the others are not used: so the generators of all ranks stay equal.
    """
    own = int(torch.randint(-(2**63), 2**63 - 1, (), device="cpu"))
    return torch.tensor(shard.exchange_value(own, "agrees on a seed")[0], device="cpu")
