"""LongNet: a transformer for tokens; a decoder where its pattern is causal, otherwise an encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from lightning_longnet.layers.attending import places_of
from lightning_longnet.layers.linear import projected
from lightning_longnet.layers.loss import CHUNK_TOKENS, TokenLoss, chunked_cross_entropy
from lightning_longnet.layers.options import positive_integer, positive_number, require
from lightning_longnet.layers.positions import checked_positions
from lightning_longnet.layers.signatures import MODEL, refuse_former
from lightning_longnet.models.blocks import Blocks, BlocksConfig
from lightning_longnet.models.cached import CachedTokens, encode_cached

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed import ProcessGroup

    from lightning_longnet.inference.cache import DilatedCache


@dataclass(frozen=True)
class LongNetConfig(BlocksConfig):
    """The configuration of a LongNet, in plain values that a YAML file can hold.

    `BlocksConfig` documents the other arguments.

    Args:
        vocab_size: size of the vocabulary.
        embedding_scale: factor of the embedded tokens.
        learned_positions: number of positions in a document that have a learned embedding, added to the tokens; None
            adds none.
        tied_embeddings: whether the head and the embedding share their weight.
        final_norm: adds a LayerNorm before the head.
        loss_chunk: number of tokens whose logits the loss holds at a time.
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
    """A LongNet, which maps tokens to logits, or to the loss of their labels without holding all logits.

    >>> pattern = Pattern.dilated((64, 256), (1, 4), is_causal=True)
    >>> model = LongNet(LongNetConfig(pattern, dim=32, layers=2, heads=4))
    >>> tokens = torch.randint(256, (1, 500))
    >>> model(tokens).shape
    torch.Size([1, 500, 256])
    >>> loss_sum, token_count = model(tokens[:, :-1], tokens[:, 1:])
    """

    config: LongNetConfig

    @refuse_former(MODEL, "LongNet", "LongNetConfig")
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
        """Initialise the embedding, the positions and the head.  The layers of the blocks initialise themselves."""
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
        cache: DilatedCache | None = None,
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
        cache: DilatedCache | None = None,
    ) -> TokenLoss: ...

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: DilatedCache | None = None,
    ) -> Tensor | TokenLoss:
        """Return logits (B, N, vocabulary), or with labels a `TokenLoss`: the sum of the losses and their number.

        Where sequences are split over ranks, N counts the tokens of this rank, and the loss is that of this rank.

        Args:
            input_ids: (B, N).
            labels: (B, N), the token that each token is to predict, or -100 where there is none.
            positions: integers (N,) or (B, N) for the rotary and the learned positions; the index of each token in its
                document by default.
            documents: integers (N,) or (B, N), the id of each token's document, not decreasing.  A token attends only
                within its document.
            attention_mask: (B, N), 0 where a token is padding.
            cache: the cache of `new_cache`, which holds the keys of the tokens before these, and takes theirs.  Tokens
                are counted from those before them, and padding on either side is not counted.
        """
        hidden = self.encode(
            self.embed(input_ids), positions=positions, documents=documents, attention_mask=attention_mask, cache=cache
        )
        if labels is None:
            return projected(self.head, hidden)
        return chunked_cross_entropy(hidden, self.head.weight, labels, chunk_tokens=self.config.loss_chunk)

    def new_cache(
        self,
        batch: int = 1,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        group: ProcessGroup | None = None,
    ) -> DilatedCache:
        """Return an empty cache for texts that this model continues.

        Args:
            batch: number of texts.
            dtype: dtype of the keys and values, that of the weights by default; int8 takes the least memory.
            device: device of the keys and values, that of the embedding by default.
            group: the ranks over which the keys and values are split; None keeps all of them in this process.
        """
        from lightning_longnet.inference.cache import DilatedCache

        weight = self.embedding.weight
        dtype = weight.dtype if dtype is None else dtype
        return DilatedCache(self.config, batch, dtype=dtype, device=device or weight.device, group=group)

    def generate(self, input_ids: Tensor, tokens: int, **options: Any) -> Tensor:
        """Return `input_ids` (B, N) continued by sampled tokens, (B, N + tokens).

        Args:
            input_ids: (B, N).
            tokens: number of tokens to add.
            options: temperature, top_k, top_p, min_p, repetition_penalty and seed; attention_mask (B, N), 0 where a row
                has padding; end, the token that ends a text; cache, a cache of the text before `input_ids`.
        """
        from lightning_longnet.models.generation import generate

        return generate(self, input_ids, tokens, **options)

    def stream(self, input_ids: Tensor, tokens: int, **options: Any) -> Iterator[Tensor]:
        """Return an iterator over the further tokens (B,) as they are sampled; see `generate`."""
        from lightning_longnet.models.generation import stream

        return stream(self, input_ids, tokens, **options)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings (B, N, dim) of input_ids (B, N), without positions: the input of `encode`."""
        return self.scale_embeddings(self.embedding(input_ids))

    def scale_embeddings(self, embedded: Tensor) -> Tensor:
        """Return what `embedding` returned, multiplied by `embedding_scale`."""
        return embedded if self.config.embedding_scale == 1.0 else embedded * self.config.embedding_scale

    def encode(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        attention_mask: Tensor | None = None,
        states: list[Tensor] | None = None,
        cache: DilatedCache | None = None,
    ) -> Tensor:
        """Map embedded tokens x (B, N, dim) to the input of the head (B, N, dim); see `forward` for the arguments.

        To the list `states` the input of each block is appended, and the output of the last.  With a `cache`,
        long inputs are computed in steps of bounded memory.
        """
        if cache is not None:
            return encode_cached(self, x, cache, CachedTokens(positions, documents, attention_mask), states)
        if self.position_table is not None:
            x = x + self._positions_of(x, positions, documents)
            if self.config.rotary is None:
                positions = None  # without a rotation, attention refuses positions
        out: Tensor = self.norm(self._run_blocks(x, positions, documents, attention_mask, states))
        return out

    def _positions_of(self, x: Tensor, positions: Tensor | None, documents: Tensor | None) -> Tensor:
        """Return the learned position embeddings of the tokens, (N, dim) or (B, N, dim)."""
        assert self.position_table is not None
        if positions is None:
            places = places_of(x, documents, self.sequence_context)
        else:
            places = checked_positions(positions, x)
        return self.learned_positions(places)

    def learned_positions(self, places: Tensor) -> Tensor:
        """Return the learned embeddings (..., dim) of positions."""
        assert self.position_table is not None
        size = len(self.position_table)
        require(
            (places >= 0) & (places < size), places, f"positions must be from 0 to learned_positions - 1, {size - 1}"
        )
        return self.position_table[places]
