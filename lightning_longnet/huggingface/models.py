"""Causal models of transformers, from a name or a folder, a configuration, or an instance, made ready for training."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_longnet.huggingface.dilation import check_dilated, keep_ring
from lightning_longnet.huggingface.rotations import replaced_rotations
from lightning_longnet.huggingface.support import split_refusals
from lightning_longnet.registration import ATTENTION
from lightning_longnet.trust import is_trusted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PretrainedConfig, PreTrainedModel


def need_transformers() -> None:
    """Raise a ModuleNotFoundError where transformers is not installed."""
    if find_spec("transformers") is None:
        raise ModuleNotFoundError("a Hugging Face model needs transformers: pip install 'lightning-longnet[hf]'")


class Source(NamedTuple):
    """Where a model comes from, one of the first three.

    Attributes:
        model: a model, a configuration, or a name.
        name: the name or the folder of a model.
        config: the values of a configuration, `model_type` among them.
        overrides: values of the configuration of a name that replace its own.
    """

    model: Any = None
    name: str | None = None
    config: dict[str, Any] | None = None
    overrides: dict[str, Any] | None = None


def model_of(source: Source, attention: str, dtype: str | None) -> PreTrainedModel:
    """Return the model of a source.

    Args:
        source: an instance or a configuration, a name, or values.
        attention: the implementation of attention.
        dtype: the dtype of the parameters of a model that is made here.
    """
    need_transformers()
    from transformers import PretrainedConfig

    model, name, config, overrides = source
    given = [each for each, value in (("model", model), ("name", name), ("config", config)) if value is not None]
    if len(given) != 1:
        raise ValueError(f"one of model, name and config must be given, got {' and '.join(given) or 'none'}")
    if isinstance(model, str):
        name = model
    if overrides and name is None:
        raise ValueError("overrides are of the configuration of a name; put these values into the configuration itself")
    if name is not None:
        found = loaded(name, attention, dtype, overrides)
    elif config is not None or isinstance(model, (PretrainedConfig, dict)):
        found = created(model if config is None else config, attention, dtype)
    else:
        check_model(model)
        return with_attention(model, attention)
    check_model(found)
    check_dilated(found.config, attention)
    return found


def check_attention(attention: str) -> None:
    """Raise a ValueError where transformers knows no implementation of attention of this name."""
    from transformers import AttentionInterface

    known = sorted({ATTENTION, "eager", *AttentionInterface().valid_keys()} - {"paged|eager"})
    is_of_hub = "/" in attention  # as in "kernels-community/flash-attn"
    if attention not in known and not is_of_hub:
        near = get_close_matches(attention, known, 1)
        question = f"; did you mean {near[0]!r}?" if near else f"; others are {', '.join(known)}"
        raise ValueError(
            f"attention must be {ATTENTION!r} or an implementation of transformers, got {attention!r}{question}"
        )


def loaded(
    name: str, attention: str, dtype: str | None = None, overrides: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """Return the model of a folder or of a name of the Hub, with its weights.

    Args:
        name: the folder or the name.
        attention: the implementation of attention.
        dtype: the dtype of the parameters; float32 by default, in which an optimiser's steps are not rounded away.
        overrides: values of the configuration that replace its own.
    """
    need_transformers()
    from transformers import AutoModelForCausalLM

    check_attention(attention)
    config = read_config(name, overrides)
    options: dict[str, Any] = {"attn_implementation": attention, "dtype": dtype or "float32"}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            name, config=config, trust_remote_code=is_trusted(), **options
        )
    except OSError as error:
        raise _unreadable(name, error) from error
    return model


def read_config(name: str, overrides: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """Return the configuration of a causal model, given its folder or its name, with other values in places."""
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=is_trusted())
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from error
    check_causal(config)
    keep_ring(config)
    values = {_FORMER.get(key, key): value for key, value in (overrides or {}).items()}
    if values.get(_ROTATIONS) is not None:
        values[_ROTATIONS] = replaced_rotations(config, values[_ROTATIONS])
    for key, value in values.items():
        if not hasattr(config, key):
            raise ValueError(f"overrides has {key!r}, which a configuration of {config.model_type} has not")
        setattr(config, key, value)
    return config


_ROTATIONS = "rope_parameters"
_FORMER = {"rope_scaling": _ROTATIONS}  # names of transformers before version 5


def _unreadable(name: str, error: Exception) -> ValueError:
    first = str(error).strip().splitlines()[0]
    return ValueError(f"name must be that of a Hugging Face model, or the folder of one, got {name!r}: {first}")


def created(config: PretrainedConfig | dict[str, Any], attention: str, dtype: str | None = None) -> PreTrainedModel:
    """Return a model with the initial weights of its class.

    Args:
        config: a configuration of transformers, or its values with the `model_type` among them.
        attention: the implementation of attention.
        dtype: the dtype of the parameters; float32 by default.
    """
    need_transformers()
    import torch
    from transformers import AutoModelForCausalLM

    check_attention(attention)
    known = config_of(config)
    check_causal(known)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        known, attn_implementation=attention, dtype=getattr(torch, dtype or "float32"), trust_remote_code=is_trusted()
    )
    return model


def config_of(config: PretrainedConfig | dict[str, Any]) -> PretrainedConfig:
    """Return a copy of a configuration, or the one that values with a `model_type` describe."""
    from copy import deepcopy

    need_transformers()
    from transformers import CONFIG_MAPPING, AutoConfig

    if not isinstance(config, dict):
        return deepcopy(config)
    values = dict(config)
    model_type = values.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"config must hold the model_type of an architecture of transformers, such as 'qwen3', got {model_type!r}"
        )
    known: PretrainedConfig = AutoConfig.for_model(model_type, **values)
    keep_ring(known)
    names = {*type(known)().to_dict(), *known.attribute_map, *_OF_ANY}
    for name in sorted(set(values) - names):  # others, which configurations on the Hub have, change nothing
        if near := get_close_matches(name, names, 1, 0.85):
            raise ValueError(
                f"config has {name!r}, which a configuration of {model_type} has not; did you mean {near[0]}?"
            )
    return known


_OF_ANY = {"dtype", "torch_dtype", "transformers_version", "architectures"}  # what a saved configuration holds as well


def check_causal(config: PretrainedConfig) -> None:
    """Raise a ValueError where a configuration is of no causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.model_type
    has_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not has_code and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"the model must be a causal language model of transformers, such as a Llama or a Qwen, got {kind!r}, "
            f"which AutoModelForCausalLM does not have"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"the model must be a decoder alone, got {kind!r}, an encoder with a decoder")
    if kind in _ENCODERS and not getattr(config, "is_decoder", False):
        raise ValueError(
            f"the model must be causal, got {kind!r} with is_decoder False, whose tokens see those that they are to "
            f"predict: set is_decoder=True in its configuration, or take a decoder, such as a Llama or a Qwen"
        )


# architectures of encoders that AutoModelForCausalLM has as well, and that are causal with `is_decoder` alone
_ENCODERS = frozenset(
    {
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
        *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"),
        *("xlm-roberta", "xlm-roberta-xl", "xmod"),
    }
)


def check_model(model: Any) -> None:
    """Raise a ValueError where an instance is of no causal language model of transformers."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model must be a model of transformers, its configuration, or a name, got {type(model).__name__}"
        )
    check_causal(model.config)
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise ValueError(
            f"model must predict tokens, got a {type(model).__name__} without an output head: load it with "
            f"AutoModelForCausalLM"
        )
    for name, module in model.named_modules():
        if getattr(module, "is_causal", None) is False:
            raise ValueError(
                f"the model must be causal, got a {type(model).__name__} whose {name} is not, so that tokens see those "
                f"that they are to predict"
            )
    if getattr(model.config, "output_router_logits", False):
        raise ValueError(
            f"output_router_logits must be False in the configuration of the {type(model).__name__}: the loss is that "
            f"of the tokens alone, without the router's, which transformers adds to it"
        )


def body_of(model: PreTrainedModel) -> Any:
    """Return the part of a model that computes the hidden states, without the output head."""
    from transformers import PreTrainedModel

    body: Any = model.base_model
    if body is model:  # where base_model_prefix names a part of a larger model, as that of Llama 4 does
        parts = [child for child in model.children() if isinstance(child, PreTrainedModel)]
        if len(parts) != 1:
            raise ValueError(f"{type(model).__name__} must have its layers in one model beside its output head")
        body = parts[0]
    return body


def check_splits(model: PreTrainedModel) -> None:
    """Raise a ValueError that names what cannot be computed on parts of sequences, where a model does such."""
    if reasons := split_refusals(model):
        raise ValueError(
            f"{type(model).__name__} cannot be split over ranks: {'; '.join(reasons)}. Train it with "
            f"sequence_parallel_size=1, or take another model"
        )


def with_attention(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """Return the model after setting its implementation of attention, where it has another."""
    check_attention(attention)
    check_dilated(model.config, attention)
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)
        if model.config._attn_implementation != attention:
            raise ValueError(
                f"{type(model).__name__} cannot attend by attn_implementation={attention!r}: its attention does not go "
                f"through transformers' AttentionInterface"
            )
    return model
