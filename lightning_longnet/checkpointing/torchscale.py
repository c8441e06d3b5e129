"""Conversion of torchscale's LongNet and LongViT to models of this package with the same outputs.

A converted model has blocked head offsets, and by default what torchscale trains with:

- `ragged="zero_keys"`: at lengths that segment lengths or rates do not divide, an encoder or a LongViT attends to the
  zeros with which torchscale pads segments.  A decoder masks them.
- `mix="detached"`: torchscale stops the gradient through the weights that mix its branches.

The outputs differ in three cases:

- A segment length that its rate does not divide, in a longer sequence.  torchscale cuts the padded segments where
  they would end without their padding, so that tokens after the first segment have outputs of other tokens.
- A padding mask.  The dilated attention of torchscale ignores it; here `attention_mask` masks keys.
- Segments that are split over ranks, which torchscale approximates.

Models with other features raise an error that names the feature: post-norm and deepnorm, multiway, mixtures of experts,
relative position biases, cross attention, a norm of embeddings, sinusoidal positions, embeddings of the features of
tiles (GigaPath).
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from ast import literal_eval
from collections.abc import Mapping
from math import isqrt, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from lightning_longnet.attention.pattern.branch import Ragged, check_one_of
from lightning_longnet.attention.pattern.pattern import Pattern
from lightning_longnet.checkpointing.restricted import read_file
from lightning_longnet.models.longnet import LongNet, LongNetConfig
from lightning_longnet.models.longvit import LongViT, LongViTConfig

if TYPE_CHECKING:
    from lightning_longnet.attention.spec import Mix

_LAYER = "layers.0.self_attn.q_proj."
_FIRST_POSITION = 2  # index of position 0 in the table of torchscale, as in that of fairseq
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "swish": "silu"}
_REFUSED_NAMES = {
    ".A.": "multiway",
    "moe_layer": "a mixture of experts",
    "encoder_attn": "cross attention",
    "layernorm_embedding": "a norm of embeddings",
    "relative_position": "a relative position bias",
    "_float_tensor": "sinusoidal positions",
}
# the arguments of torchscale's configurations that the conversion reads
ARGUMENTS = (
    *(f"{kind}_{name}" for kind in ("encoder", "decoder") for name in ("attention_heads", "normalize_before")),
    *("share_encoder_input_output_embed", "share_decoder_input_output_embed", "no_scale_embedding", "activation_fn"),
    *("segment_length", "dilated_ratio", "xpos_scale_base", "layernorm_eps", "num_heads", "final_norm_eps"),
)
REFUSED_ARGUMENTS = ("deepnorm", "multiway", "moe_freq", "rel_pos_buckets", "layernorm_embedding")
# LongViT's rates, and its segment lengths by the size of the images
_LONGVIT_RATES = [1, 2, 4, 8, 16]
_LONGVIT_SEGMENTS = {
    4096: [1024, 2048, 4096, 8192, 16384],
    8192: [1024, 4096, 8192, 16384, 65536],
    16384: [1024, 4096, 16384, 65536, 262144],
    32768: [1024, 4096, 32768, 262144, 1048576],
}


def read_torchscale(path: str | Path, key: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights in a file of torchscale, and the arguments of the model, which are empty if it has none.

    Args:
        path: a file that `torch.save` wrote: a state dict, or a dictionary that contains one, as the checkpoints of
            fairseq and LongViT do.
        key: the key of the state dict in that dictionary; not needed if only one value is a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path must be a file that torch.save wrote, got {path}, which is none")
    content = read_file(path, (Namespace,))
    if not isinstance(content, dict):
        raise ValueError(f"path must hold a dictionary, got {path}, which holds a {type(content).__name__}")
    inside = {name: value for name, value in content.items() if isinstance(value, Mapping) and _roots(value)}
    if key is not None:
        if key not in inside:
            raise ValueError(f"key must be one of {', '.join(map(repr, inside)) or 'none'}, got {key!r}")
        weights = inside[key]
    elif _roots(content):
        weights = content
    elif len(inside) == 1:
        (weights,) = inside.values()
    else:
        if not inside:
            raise ValueError(f"source must hold weights of torchscale, whose names end with {_LAYER}weight, found none")
        among = f"under which of {', '.join(map(repr, inside))} they are"
        raise ValueError(
            f"key must say {among}: weights of a torchscale model have a name that ends with {_LAYER}weight"
        )
    options = content.get("args")
    if options is None and isinstance(content.get("cfg"), Mapping):
        options = content["cfg"].get("model")  # as newer versions of fairseq save them
    arguments = dict(vars(options)) if isinstance(options, Namespace) else dict(options or {})
    return {name: x for name, x in weights.items() if isinstance(x, Tensor)}, arguments


def from_torchscale(
    state: Mapping[str, Tensor], arguments: Mapping[str, Any], mix: Mix = "detached", ragged: Ragged = "zero_keys"
) -> LongNet | LongViT:
    """Return the LongNet or LongViT that computes what a model of torchscale does, in evaluation mode.

    Args:
        state: the state dict of the model, with any prefix before the names of torchscale.
        arguments: the arguments of torchscale's EncoderConfig or DecoderConfig that cannot be read from the weights.
            `decoder_attention_heads` or `encoder_attention_heads`, `segment_length` and `dilated_ratio` are required;
            `activation_fn`, `layernorm_eps`, `no_scale_embedding` and `xpos_scale_base` have the defaults of
            torchscale.  `final_norm_eps`, the epsilon of the last norm of a LongViT, is 1e-5 by default, and 1e-6 if
            that norm comes before the pooling.
        mix: "detached" trains as torchscale does; "exact" trains with the gradient of the computed function.
        ragged: "zero_keys" attends to padding as torchscale does, which the weights are trained for; "exact" to tokens
            alone, for further training.  Decoders are the same with both.
    """
    check_one_of("ragged", ragged, get_args(Ragged))
    roots = _roots(state)
    if len(roots) != 1:
        shown = ", ".join(map(repr, roots)) or "none"
        raise ValueError(f"state must hold one model, with a weight ...{_LAYER}weight, got {shown}")
    (root,) = roots
    outer = root.removesuffix("encoder.")
    if f"{outer}patch_embed.proj.weight" in state:
        return _longvit(_Weights(state, outer), state, arguments, mix, ragged)
    return _longnet(_Weights(state, root), arguments, mix, ragged)


def _roots(state: Mapping[str, Any]) -> list[str]:
    """Return the prefixes before the names of layers, one for each model in the state dict."""
    ends = (f"{_LAYER}weight", f"{_LAYER}A.weight")
    return [name.removesuffix(end) for name in state for end in ends if isinstance(name, str) and name.endswith(end)]


class _Weights:
    """The weights below a prefix.  Each is taken once, and `finish` refuses those that nothing took."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        self.prefix = prefix
        self.left = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
        for name in self.left:
            for part, reason in _REFUSED_NAMES.items():
                if part in name:
                    raise ValueError(f"state must not hold {reason}, which has no counterpart here, got {prefix}{name}")

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str) -> Tensor:
        """Remove a weight and return a copy of it."""
        if name not in self.left:
            raise ValueError(f"state must hold {self.prefix}{name}, which is missing")
        return self.left.pop(name).clone()

    def move(self, ours: str, name: str) -> dict[str, Tensor]:
        """Take weight and bias of a norm or a linear map, under the name `ours` of the module in this package."""
        return {f"{ours}.{part}": self.take(f"{name}.{part}") for part in ("weight", "bias")}

    def finish(self) -> None:
        """Raise a ValueError if a weight was not taken, as this package has nothing that it belongs to."""
        # the version of fairseq's decoders and the buffer of xPos, which head_dim determines, carry no information
        rest = [name for name in self.left if name != "version" and not name.endswith("xpos.scale")]
        if rest:
            raise ValueError(f"state must hold nothing that has no counterpart here, got {self.prefix}{rest[0]}")


def _longnet(weights: _Weights, arguments: Mapping[str, Any], mix: Mix, ragged: Ragged) -> LongNet:
    """Return the LongNet of an encoder or a decoder; the arguments are those of `from_torchscale`."""
    kind = _kind(weights.prefix, arguments)
    embedding = weights.take("embed_tokens.weight")
    converted = {"embedding.weight": embedding}
    if "embed_positions.weight" in weights:
        converted["position_table"] = weights.take("embed_positions.weight")[_FIRST_POSITION:]
    head = embedding  # also of models without a head
    if "output_projection.weight" in weights:
        head = weights.take("output_projection.weight")
    is_tied = bool(arguments.get(f"share_{kind}_input_output_embed")) or torch.equal(head, embedding)
    converted["head.weight"] = embedding if is_tied else head
    has_norm = "layer_norm.weight" in weights
    if has_norm:
        converted |= weights.move("norm", "layer_norm")
    # a causal mask excludes the padding
    fields, block_state = _blocks(weights, "", kind, arguments, "exact" if kind == "decoder" else ragged)
    weights.finish()
    scale = 1.0 if arguments.get("no_scale_embedding", True) else sqrt(embedding.shape[1])
    config = LongNetConfig(
        **fields,
        vocab_size=len(embedding),
        embedding_scale=scale,
        learned_positions=len(converted["position_table"]) if "position_table" in converted else None,
        tied_embeddings=is_tied,
        final_norm=has_norm,
        mix=mix,
    )
    model = LongNet(config)
    model.load_state_dict(converted | block_state)
    return model.eval()


def _longvit(
    weights: _Weights, state: Mapping[str, Tensor], arguments: Mapping[str, Any], mix: Mix, ragged: Ragged
) -> LongViT:
    """Return the LongViT of the weights of its backbone, and of `state`, which also has the classifier around it."""
    patches = weights.take("patch_embed.proj.weight")
    if patches.dim() != 4:
        raise ValueError(
            f"state must hold {weights.prefix}patch_embed.proj.weight of 4 dimensions, a convolution over pixels, got "
            f"shape {tuple(patches.shape)}: an embedding of the features of tiles, as in GigaPath, has no counterpart "
            "here, since a LongViT has no tiles at coordinates of their own"
        )
    table = weights.take("pos_embed")[0]
    side = isqrt(len(table))
    channels, patch_size = patches.shape[1:3]
    converted = {
        "patch_embedding.weight": patches.flatten(1),
        "patch_embedding.bias": weights.take("patch_embed.proj.bias"),
        "position_table": table.unflatten(0, (side, side)),
    }
    ends = _Weights(state, weights.prefix.removesuffix("model."))
    is_pooled_first = "fc_norm.weight" in ends
    if not is_pooled_first:
        ends = weights
    converted |= ends.move("norm", "fc_norm" if is_pooled_first else "norm")
    classes = 0
    if "head.weight" in ends:
        converted |= ends.move("head", "head")
        classes = len(converted["head.weight"])
    fields, block_state = _blocks(
        weights,
        "encoder.",
        "encoder",
        {"segment_length": _LONGVIT_SEGMENTS.get(side * patch_size, [64, 128, 256, 512, 1024])}
        | {"dilated_ratio": _LONGVIT_RATES, "encoder_attention_heads": arguments.get("num_heads")}
        | {name: value for name, value in arguments.items() if value is not None},
        ragged,
    )
    weights.finish()
    config = LongViTConfig(
        **fields,
        classes=classes,
        image_size=side * patch_size,
        patch_size=patch_size,
        channels=channels,
        resize_offset=0.1,
        normed="pooled" if is_pooled_first else "tokens",
        final_norm_eps=arguments.get("final_norm_eps", 1e-5 if is_pooled_first else 1e-6),
        mix=mix,
    )
    model = LongViT(config)
    model.load_state_dict(converted | block_state)
    return model.eval()


def _kind(prefix: str, arguments: Mapping[str, Any]) -> str:
    """Return "decoder" or "encoder", read from the prefix of the weights or from the arguments."""
    for kind in ("decoder", "encoder"):
        if prefix.endswith(f"{kind}."):
            return kind
    kinds = [kind for kind in ("decoder", "encoder") if arguments.get(f"{kind}_attention_heads") is not None]
    if len(kinds) != 1:
        raise ValueError(
            f"arguments must hold decoder_attention_heads or encoder_attention_heads, and not both, as nothing else "
            f"says which of them the model is, got {', '.join(map(str, arguments)) or 'none'}"
        )
    return kinds[0]


def _blocks(
    weights: _Weights, prefix: str, kind: str, arguments: Mapping[str, Any], ragged: Ragged
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the fields of BlocksConfig that describe the blocks, and the weights of the blocks by our names."""
    for name in REFUSED_ARGUMENTS:
        if arguments.get(name):
            raise ValueError(f"arguments must not hold {name}, which has no counterpart here, got {arguments[name]!r}")
    column = f"{prefix}layers."
    numbers = [int(name.removeprefix(column).split(".")[0]) for name in weights.left if name.startswith(column)]
    layers = 1 + max(numbers)
    has_sub_norm = f"{prefix}layers.0.self_attn.inner_attn_ln.weight" in weights
    has_xpos = f"{prefix}layers.0.self_attn.xpos.scale" in weights
    if not has_sub_norm and not arguments.get(f"{kind}_normalize_before", True):
        raise ValueError(f"arguments must not hold {kind}_normalize_before=False: post-norm has no counterpart here")
    activation = arguments.get("activation_fn", "gelu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation_fn must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    heads = arguments.get(f"{kind}_attention_heads")
    if heads is None:
        raise ValueError(f"arguments must hold {kind}_attention_heads, of which weights say nothing")
    converted: dict[str, Tensor] = {}
    for i in range(layers):
        theirs, ours = f"{prefix}layers.{i}", f"blocks.{i}"
        for part in ("weight", "bias"):
            projections = [weights.take(f"{theirs}.self_attn.{each}_proj.{part}") for each in "qkv"]
            converted[f"{ours}.attention.qkv_proj.{part}"] = torch.cat(projections)
        names = {
            "attention.out_proj": "self_attn.out_proj",
            "attention_norm": "self_attn_layer_norm",
            "feed_forward_norm": "final_layer_norm",
            "feed_forward.first": "ffn.fc1",
            "feed_forward.second": "ffn.fc2",
        }
        if has_sub_norm:
            names |= {"attention.sub_norm": "self_attn.inner_attn_ln", "feed_forward.sub_norm": "ffn.ffn_layernorm"}
        for name, their_name in names.items():
            converted |= weights.move(f"{ours}.{name}", f"{theirs}.{their_name}")
    segments, rates = _integers("segment_length", arguments), _integers("dilated_ratio", arguments)
    fields = {
        "pattern": Pattern.dilated(segments, rates, kind == "decoder", "blocked", ragged=ragged),
        "dim": converted["blocks.0.attention_norm.weight"].shape[0],
        "layers": layers,
        "heads": heads,
        "hidden_dim": converted["blocks.0.feed_forward.first.weight"].shape[0],
        "activation": _ACTIVATIONS[activation],
        "rotary": "xpos" if has_xpos else None,
        "xpos_scale_base": arguments.get("xpos_scale_base", 512),
        "sub_norm": has_sub_norm,
        "norm_eps": arguments.get("layernorm_eps", 1e-5),
    }
    if odd := [f"{w} by {r}" for w, r in zip(segments, rates, strict=True) if w % r]:
        warnings.warn(
            f"the outputs of this model differ from torchscale's in sequences of more tokens than a segment whose rate "
            f"does not divide it ({', '.join(odd)}): torchscale displaces the outputs of later segments",
            stacklevel=4,
        )
    return fields, converted


def _integers(name: str, arguments: Mapping[str, Any]) -> list[int]:
    """Return a list of integers from the arguments, where torchscale may have it as text."""
    given = arguments.get(name)
    try:
        values = literal_eval(given) if isinstance(given, str) else given
    except (ValueError, SyntaxError):
        values = None
    if not isinstance(values, (list, tuple)) or not values or not all(isinstance(each, int) for each in values):
        raise ValueError(f"{name} must be a list of integers, as '[2048,4096]', got {given!r}")
    return list(values)
