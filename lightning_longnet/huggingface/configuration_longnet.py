"""The configuration of a LongNet for transformers.  This file needs the package lightning-longnet."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from lightning_longnet.models.longnet import LongNetConfig


class LongNetPretrainedConfig(PretrainedConfig):
    """A configuration that holds the values of a LongNetConfig, and the fields that transformers reads of any model.

    Args:
        longnet: the dictionary of `LongNetConfig.to_dict`.
        kwargs: further arguments of PretrainedConfig.  Those that `longnet` determines are overwritten.
    """

    model_type = "longnet"

    def __init__(self, longnet: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if longnet is not None:  # transformers makes one without arguments, to compare with
            config = LongNetConfig(**longnet)
            kwargs |= {
                "vocab_size": config.vocab_size,
                "hidden_size": config.dim,
                "num_hidden_layers": config.layers,
                "num_attention_heads": config.heads,
                "tie_word_embeddings": config.tied_embeddings,
                "use_cache": False,
            }
        self.longnet = longnet
        super().__init__(**kwargs)
