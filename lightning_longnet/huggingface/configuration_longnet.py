"""The configuration of a LongNet for transformers.  This file needs the package lightning-longnet."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from lightning_longnet.inference.cache import refusal
from lightning_longnet.models.longnet import LongNetConfig
from lightning_longnet.trust import check_class

# the fields that transformers reads of any model, and the names of their values in LongNetConfig
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "tie_word_embeddings": "tied_embeddings",
}


class LongNetPretrainedConfig(PretrainedConfig):
    """A configuration that holds the values of a LongNetConfig, and the fields that transformers reads of any model.

    What is set in one of those fields is set in `longnet` too.

    Args:
        longnet: the dictionary of `LongNetConfig.to_dict`.
        kwargs: further arguments of PretrainedConfig.  Those that `longnet` determines must agree with it.
    """

    model_type = "longnet"

    def __init__(self, longnet: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if longnet is not None:  # transformers makes one without arguments, to compare with
            attention = longnet.get("attention")
            # the copy of this file in a folder runs with trust_remote_code alone
            if isinstance(attention, dict) and __name__.startswith("lightning_longnet."):
                check_class("longnet.attention", attention.get("class_path"))
            config = LongNetConfig(**longnet)
            for name, field in FIELDS.items():
                value = getattr(config, field)
                if kwargs.setdefault(name, value) != value:
                    raise ValueError(f"{name} must be {field} of longnet, {value!r}, got {kwargs[name]!r}")
            kwargs.setdefault("use_cache", refusal(config) is None)
            if config.learned_positions is not None:
                kwargs.setdefault("max_position_embeddings", config.learned_positions)
        self.longnet = longnet
        super().__init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)  # type: ignore[no-untyped-call]
        values = self.__dict__.get("longnet")
        if name in FIELDS and values is not None:
            self.longnet = {**values, FIELDS[name]: value}

    def longnet_config(self) -> LongNetConfig:
        """Return the LongNetConfig; refuse one that predicts no next token, or that differs from the other fields."""
        if self.longnet is None:
            raise ValueError("longnet must be the values of a LongNetConfig, got None")
        config = LongNetConfig(**self.longnet)
        for name, field in FIELDS.items():
            if getattr(self, name) != getattr(config, field):
                raise ValueError(
                    f"{name} must be {field} of longnet, {getattr(config, field)!r}, got {getattr(self, name)!r}"
                )
        if not config.is_causal:
            raise ValueError("the pattern of longnet must be causal in every layer, to predict the next token")
        return config
