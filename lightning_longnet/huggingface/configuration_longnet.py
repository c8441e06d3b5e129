"""The configuration of a LongNet for transformers.  It needs the package lightning-longnet."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from lightning_longnet.models.longnet import LongNetConfig


class LongNetPretrainedConfig(PretrainedConfig):
    """Holds what `LongNetConfig.to_dict` gives, and what transformers asks of any model.

    Args:
        longnet: the values of a LongNetConfig.
        kwargs: of transformers; what follows from `longnet` is taken from there.
    """

    model_type = "longnet"

    def __init__(self, longnet: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if longnet is not None:  # transformers makes one of nothing, to compare with
            found = LongNetConfig(**longnet)
            kwargs |= {
                "vocab_size": found.vocab_size,
                "hidden_size": found.dim,
                "num_hidden_layers": found.layers,
                "num_attention_heads": found.heads,
                "tie_word_embeddings": found.tied_embeddings,
                "use_cache": False,
            }
        self.longnet = longnet
        super().__init__(**kwargs)
