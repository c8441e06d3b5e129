"""LongNet: a transformer whose attention is a pattern, as a decoder or, where the pattern is not causal, an encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor, nn

from lightning_longnet.layers.attending import places_of
from lightning_longnet.layers.loss import CHUNK_TOKENS, TokenLoss, chunked_cross_entropy
from lightning_longnet.layers.options import positive_integer, positive_number, require
from lightning_longnet.layers.positions import checked_positions
from lightning_longnet.models.blocks import Blocks, BlocksConfig


@dataclass(frozen=True)
class LongNetConfig(BlocksConfig):
    """The shape of a model of tokens, in plain values that a YAML file can hold.

    What is not named here is of the blocks; see `BlocksConfig`.

    Args:
        vocab_size: tokens that are told apart.
        embedding_scale: what embedded tokens are multiplied with.
        learned_positions: a learned vector is added for each of so many places in a document; None has none.
        tied_embeddings: the head's weight is that of the embedding.
        final_norm: a LayerNorm before the head.
        loss_chunk: tokens whose logits the loss holds at a time.
    """

    vocab_size: int = 256
    embedding_scale: float = 1.0
    learned_positions: int | None = None
    tied_embeddings: bool = True
    final_norm: bool = True
    loss_chunk: int = CHUNK_TOKENS

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab_size", "loss_chunk"):
            positive_integer(name, getattr(self, name))
        positive_number("embedding_scale", self.embedding_scale)
        if self.learned_positions is not None:
            positive_integer("learned_positions", self.learned_positions)


class LongNet(Blocks):
    """Tokens to logits, or to the loss of their labels without ever holding all logits.

    >>> pattern = Pattern.dilated((64, 256), (1, 4), is_causal=True)
    >>> model = LongNet(LongNetConfig(pattern, dim=32, layers=2, heads=4))
    >>> tokens = torch.randint(256, (1, 500))
    >>> model(tokens).shape
    torch.Size([1, 500, 256])
    >>> loss_sum, token_count = model(tokens[:, :-1], tokens[:, 1:])
    """

    config: LongNetConfig

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.position_table = None
        if config.learned_positions is not None:
            self.position_table = nn.Parameter(torch.empty(config.learned_positions, config.dim))
        self._make_blocks(config)
        self.norm = nn.LayerNorm(config.dim, config.norm_eps) if config.final_norm else nn.Identity()
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Of the embedding, the positions and the head; the layers begin by themselves."""
        nn.init.normal_(self.embedding.weight, std=self.config.dim**-0.5)
        if self.position_table is not None:
            nn.init.normal_(self.position_table, std=self.config.dim**-0.5)
        if not self.config.tied_embeddings:
            nn.init.normal_(self.head.weight, std=self.config.dim**-0.5)

    @overload
    def forward(
        self,
        input_ids: Tensor,
        labels: None = None,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> TokenLoss: ...

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | TokenLoss:
        """Logits (B, N, vocabulary), or, with labels, the sum of their losses and how many count.

        Args:
            input_ids: (B, N); this rank's part where sequences are split.
            labels: (B, N): of each token the one that it is to predict, or -100.
            positions: (N,) or (B, N), for the rotation and what is learned; places in the document by default.
            documents: an id per token, not decreasing: each document is attended to alone.
            attention_mask: (B, N), 0 where a token is padding.
        """
        hidden = self.encode(
            self.embed(input_ids), positions=positions, documents=documents, attention_mask=attention_mask
        )
        if labels is None:
            logits: Tensor = self.head(hidden)
            return logits
        return chunked_cross_entropy(hidden, self.head.weight, labels, chunk_tokens=self.config.loss_chunk)

    def embed(self, input_ids: Tensor) -> Tensor:
        """What `encode` takes, (B, N, dim)."""
        found: Tensor = self.embedding(input_ids)
        return found if self.config.embedding_scale == 1.0 else found * self.config.embedding_scale

    def encode(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Embedded tokens (B, N, dim) to what the head reads, as wide."""
        if self.position_table is not None:
            x = x + self._positions_of(x, positions, documents)
            if self.config.rotary is None:
                positions = None  # which nothing else reads
        out: Tensor = self.norm(self._passed(x, positions, documents, attention_mask))
        return out

    def _positions_of(self, x: Tensor, positions: Tensor | None, documents: Tensor | None) -> Tensor:
        """The learned vectors, (N, dim) or (B, N, dim)."""
        assert self.position_table is not None
        many = len(self.position_table)
        if positions is None:
            places = places_of(x, documents, self.sequence_context)
        else:
            places = checked_positions(positions, x)
        require(
            (places >= 0) & (places < many), places, f"positions must be from 0 to learned_positions - 1, {many - 1}"
        )
        return self.position_table[places]
