"""torchscale's LongNet and LongViT in ours, with the same outputs.

What stands for what: blocked head offsets, and in training the mixture through which torchscale lets no gradient
(`mix="detached"`).  Where outputs differ:

- An encoder, or a LongViT, over a length that its segments or rates do not divide: torchscale pads with zeros, which
  are keys to it.  Here padding never takes part.  (Decoders are the same at any length: what follows is hidden.)
- Padding: torchscale's dilated attention does not read its padding mask; here `attention_mask` hides keys.
- Segments that are split over ranks, which torchscale approximates.

What cannot be the same is refused by its name: post-norm and deepnorm, multiway, mixtures of experts, relative position
biases, cross attention, a norm of embeddings, sinusoidal positions.
"""

from __future__ import annotations

from argparse import Namespace
from ast import literal_eval
from collections.abc import Mapping
from math import isqrt, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_longnet.attention.pattern.pattern import Pattern
from lightning_longnet.checkpointing.checkpoints import read_file
from lightning_longnet.models.longnet import LongNet, LongNetConfig
from lightning_longnet.models.longvit import LongViT, LongViTConfig

if TYPE_CHECKING:
    from lightning_longnet.attention.spec import Mix

_LAYER = "layers.0.self_attn.q_proj."
_FIRST_POSITION = 2  # its learned positions begin there, as fairseq's do
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "swish": "silu"}
_REFUSED_NAMES = {
    ".A.": "multiway",
    "moe_layer": "a mixture of experts",
    "encoder_attn": "cross attention",
    "layernorm_embedding": "a norm of embeddings",
    "relative_position": "a relative position bias",
    "_float_tensor": "sinusoidal positions",
}
# what is read, of all that torchscale's configurations have
ARGUMENTS = (
    *(f"{kind}_{name}" for kind in ("encoder", "decoder") for name in ("attention_heads", "normalize_before")),
    *("share_encoder_input_output_embed", "share_decoder_input_output_embed", "no_scale_embedding", "activation_fn"),
    *("segment_length", "dilated_ratio", "xpos_scale_base", "layernorm_eps", "num_heads", "final_norm_eps"),
)
REFUSED_ARGUMENTS = ("deepnorm", "multiway", "moe_freq", "rel_pos_buckets", "layernorm_embedding")
# LongViT's own, by the size of the images
_LONGVIT_RATES = [1, 2, 4, 8, 16]
_LONGVIT_SEGMENTS = {
    4096: [1024, 2048, 4096, 8192, 16384],
    8192: [1024, 4096, 8192, 16384, 65536],
    16384: [1024, 4096, 16384, 65536, 262144],
    32768: [1024, 4096, 32768, 262144, 1048576],
}


def read_torchscale(path: str | Path, key: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a file, and the arguments that it was made with, where it holds them.

    Args:
        path: what `torch.save` wrote: a state dict, or a dictionary that holds one, as fairseq's and LongViT's do.
        key: under which of its keys the weights are; not needed where there is one.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path must be a file that torch.save wrote, got {path}, which is none")
    found = read_file(path, (Namespace,))
    if not isinstance(found, dict):
        raise ValueError(f"path must hold a dictionary, got {path}, which holds a {type(found).__name__}")
    inside = {name: value for name, value in found.items() if isinstance(value, Mapping) and _roots(value)}
    if key is not None:
        if key not in inside:
            raise ValueError(f"key must be one of {', '.join(map(repr, inside)) or 'none'}, got {key!r}")
        weights = inside[key]
    elif _roots(found):
        weights = found
    elif len(inside) == 1:
        (weights,) = inside.values()
    else:
        among = f"under which of {', '.join(map(repr, inside))} they are" if inside else "what they are: found none"
        raise ValueError(
            f"key must say {among}: weights of a torchscale model have a name that ends with {_LAYER}weight"
        )
    told = found.get("args")
    if told is None and isinstance(found.get("cfg"), Mapping):
        told = found["cfg"].get("model")  # newer fairseqs
    arguments = dict(vars(told)) if isinstance(told, Namespace) else dict(told or {})
    return {name: x for name, x in weights.items() if isinstance(x, Tensor)}, arguments


def from_torchscale(
    state: Mapping[str, Tensor], arguments: Mapping[str, Any], mix: Mix = "detached"
) -> LongNet | LongViT:
    """The same model, of a state dict and of the arguments of torchscale's EncoderConfig or DecoderConfig.

    Args:
        state: weights by torchscale's names, whatever stands before them.
        arguments: by torchscale's names, of which weights say nothing: decoder_attention_heads (or those of the
            encoder), segment_length and dilated_ratio are needed; activation_fn, layernorm_eps, no_scale_embedding,
            xpos_scale_base have torchscale's defaults.  `final_norm_eps` is of a LongViT's last norm: 1e-5, and 1e-6
            where that stands before the pooling.
        mix: "detached" trains as torchscale does, "exact" by the gradient of what is computed.
    """
    roots = _roots(state)
    if len(roots) != 1:
        shown = ", ".join(map(repr, roots)) or "none"
        raise ValueError(f"state must hold one model, with a weight ...{_LAYER}weight, got {shown}")
    (root,) = roots
    outer = root.removesuffix("encoder.")
    if f"{outer}patch_embed.proj.weight" in state:
        return _longvit(_Weights(state, outer), state, arguments, mix)
    return _longnet(_Weights(state, root), arguments, mix)


def _roots(state: Mapping[str, Any]) -> list[str]:
    """What stands before the names of a model's layers."""
    ends = (f"{_LAYER}weight", f"{_LAYER}A.weight")
    return [name.removesuffix(end) for name in state for end in ends if isinstance(name, str) and name.endswith(end)]


class _Weights:
    """Those below a prefix, each to be taken once."""

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
        if name not in self.left:
            raise ValueError(f"state must hold {self.prefix}{name}, which is missing")
        return self.left.pop(name).clone()

    def move(self, ours: str, name: str) -> dict[str, Tensor]:
        """A norm or a linear map."""
        return {f"{ours}.{part}": self.take(f"{name}.{part}") for part in ("weight", "bias")}

    def finish(self) -> None:
        # fairseq's decoders have a version, xPos a buffer that follows from the size of a head
        rest = [name for name in self.left if name != "version" and not name.endswith("xpos.scale")]
        if rest:
            raise ValueError(f"state must hold nothing that has no counterpart here, got {self.prefix}{rest[0]}")


def _longnet(weights: _Weights, arguments: Mapping[str, Any], mix: Mix) -> LongNet:
    kind = _kind(weights.prefix, arguments)
    embedding = weights.take("embed_tokens.weight")
    found = {"embedding.weight": embedding}
    if "embed_positions.weight" in weights:
        found["position_table"] = weights.take("embed_positions.weight")[_FIRST_POSITION:]
    head = embedding  # where it has none, too
    if "output_projection.weight" in weights:
        head = weights.take("output_projection.weight")
    is_tied = bool(arguments.get(f"share_{kind}_input_output_embed")) or torch.equal(head, embedding)
    found["head.weight"] = embedding if is_tied else head
    has_norm = "layer_norm.weight" in weights
    if has_norm:
        found |= weights.move("norm", "layer_norm")
    told, blocks = _blocks(weights, "", kind, arguments, is_causal=kind == "decoder")
    weights.finish()
    scale = 1.0 if arguments.get("no_scale_embedding", True) else sqrt(embedding.shape[1])
    config = LongNetConfig(
        **told,
        vocab_size=len(embedding),
        embedding_scale=scale,
        learned_positions=len(found["position_table"]) if "position_table" in found else None,
        tied_embeddings=is_tied,
        final_norm=has_norm,
        mix=mix,
    )
    model = LongNet(config)
    model.load_state_dict(found | blocks)
    return model.eval()


def _longvit(weights: _Weights, state: Mapping[str, Tensor], arguments: Mapping[str, Any], mix: Mix) -> LongViT:
    patches = weights.take("patch_embed.proj.weight")
    table = weights.take("pos_embed")[0]
    side = isqrt(len(table))
    channels, patch_size = patches.shape[1:3]
    found = {
        "patch_embedding.weight": patches.flatten(1),
        "patch_embedding.bias": weights.take("patch_embed.proj.bias"),
        "position_table": table.unflatten(0, (side, side)),
    }
    ends = _Weights(state, weights.prefix.removesuffix("model."))
    is_pooled_first = "fc_norm.weight" in ends
    if not is_pooled_first:
        ends = weights
    found |= ends.move("norm", "fc_norm" if is_pooled_first else "norm")
    classes = 0
    if "head.weight" in ends:
        found |= ends.move("head", "head")
        classes = len(found["head.weight"])
    told, blocks = _blocks(
        weights,
        "encoder.",
        "encoder",
        {"segment_length": _LONGVIT_SEGMENTS.get(side * patch_size, [64, 128, 256, 512, 1024])}
        | {"dilated_ratio": _LONGVIT_RATES, "encoder_attention_heads": arguments.get("num_heads")}
        | {name: value for name, value in arguments.items() if value is not None},
        is_causal=False,
    )
    weights.finish()
    config = LongViTConfig(
        **told,
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
    model.load_state_dict(found | blocks)
    return model.eval()


def _kind(prefix: str, arguments: Mapping[str, Any]) -> str:
    for kind in ("decoder", "encoder"):
        if prefix.endswith(f"{kind}."):
            return kind
    told = [kind for kind in ("decoder", "encoder") if arguments.get(f"{kind}_attention_heads") is not None]
    if len(told) != 1:
        raise ValueError(
            f"arguments must hold decoder_attention_heads or encoder_attention_heads, and not both, as nothing else "
            f"says which of them the model is, got {', '.join(map(str, arguments)) or 'none'}"
        )
    return told[0]


def _blocks(
    weights: _Weights, prefix: str, kind: str, arguments: Mapping[str, Any], is_causal: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the configuration says of the blocks, and their weights."""
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
    found: dict[str, Tensor] = {}
    for i in range(layers):
        theirs, ours = f"{prefix}layers.{i}", f"blocks.{i}"
        for part in ("weight", "bias"):
            projections = [weights.take(f"{theirs}.self_attn.{each}_proj.{part}") for each in "qkv"]
            found[f"{ours}.attention.qkv_proj.{part}"] = torch.cat(projections)
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
            found |= weights.move(f"{ours}.{name}", f"{theirs}.{their_name}")
    told = {
        "pattern": Pattern.dilated(
            _integers("segment_length", arguments), _integers("dilated_ratio", arguments), is_causal, "blocked"
        ),
        "dim": found["blocks.0.attention_norm.weight"].shape[0],
        "layers": layers,
        "heads": heads,
        "hidden_dim": found["blocks.0.feed_forward.first.weight"].shape[0],
        "activation": _ACTIVATIONS[activation],
        "rotary": "xpos" if has_xpos else None,
        "xpos_scale_base": arguments.get("xpos_scale_base", 512),
        "sub_norm": has_sub_norm,
        "norm_eps": arguments.get("layernorm_eps", 1e-5),
    }
    return told, found


def _integers(name: str, arguments: Mapping[str, Any]) -> list[int]:
    """Torchscale has them as text."""
    given = arguments.get(name)
    try:
        found = literal_eval(given) if isinstance(given, str) else given
    except (ValueError, SyntaxError):
        found = None
    if not isinstance(found, (list, tuple)) or not found or not all(isinstance(each, int) for each in found):
        raise ValueError(f"{name} must be a list of integers, as '[2048,4096]', got {given!r}")
    return list(found)
