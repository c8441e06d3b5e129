"""Layers of a model of transformers that are recomputed in the backward, and feed-forwards in chunks of tokens."""

from __future__ import annotations

from inspect import Parameter, signature
from types import MethodType
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from lightning_longnet.layers.checkpointing import in_chunks, keep_attention, keep_attention_on_host
from lightning_longnet.layers.feed_forward import FeedForward
from lightning_longnet.layers.offloading import input_on_host
from lightning_longnet.models.blocks import Recompute
from lightning_longnet.sequence.attach import attached_context
from lightning_longnet.sequence.dropout_hooks import inputs_as_parts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lightning_longnet.sequence.context import SequenceContext

_CHUNK = "_chunk_tokens"  # the attribute of a feed-forward that says how many tokens it computes at a time
_TOLERANCE = 1e-4  # of results, relative to the largest
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")  # modules of Python


def recompute_layers(model: Any, recompute: Recompute, activation_offload: bool) -> None:
    """Have the layers of a model recomputed in the backward.

    Args:
        model: a model of transformers.
        recompute: what is recomputed; see `CausalLMModule`.
        activation_offload: keeps what the recomputation begins with in the memory of the host.
    """
    if recompute not in get_args(Recompute):
        raise ValueError(f"recompute must be one of {', '.join(map(repr, get_args(Recompute)))}, got {recompute!r}")
    if not isinstance(activation_offload, bool):
        raise ValueError(f"activation_offload must be True or False, got {activation_offload!r}")
    if recompute == "nothing":
        if activation_offload:
            raise ValueError(
                "recompute must be 'everything' or 'all but attention' with activation_offload, which keeps the inputs "
                "of recomputed layers on the host, got 'nothing'"
            )
        return
    if not model.supports_gradient_checkpointing:
        raise ValueError(f"recompute must be 'nothing' with a {type(model).__name__}, which recomputes nothing")
    options: dict[str, Any] = {"use_reentrant": False}
    if recompute == "all but attention":
        options["context_fn"] = keep_attention_on_host if activation_offload else keep_attention
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:  # before transformers 5.23
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    else:
        enable(activation_checkpointing_kwargs=options)
    if activation_offload:
        _offload_inputs(model)


def _offload_inputs(model: Any) -> None:
    """Keep the inputs of the layers that are recomputed on the host."""
    for module in model.modules():
        for name in ("_gradient_checkpointing_func", "checkpointing"):  # the second is that of our own blocks
            if (checkpointed := module.__dict__.get(name)) is not None:
                setattr(module, name, input_on_host(checkpointed))


def chunk_feed_forwards(model: Any, chunk_tokens: int) -> None:
    """Have the feed-forwards of a model computed, and recomputed in the backward, in chunks of tokens.

    A feed-forward that may compute a token from other tokens raises a ValueError with its name.

    Args:
        model: a model of transformers.
        chunk_tokens: number of tokens of a sequence that are computed at a time.
    """
    if fault := fault_of_chunks(model):
        raise ValueError(f"mlp_chunk_tokens must be None with a {type(model).__name__}{fault}")
    for _, module in _feed_forwards(model):
        if isinstance(module, FeedForward):
            module.chunk_tokens = chunk_tokens
        else:
            setattr(module, _CHUNK, chunk_tokens)
            module.forward = MethodType(_forward_in_chunks, module)


def fault_of_chunks(model: Any) -> str:
    """Return why the feed-forwards of a model of transformers cannot be computed in chunks, or an empty string."""
    modules = dict(_feed_forwards(model))
    if not modules:
        return ", whose layers have no module for it"
    width = model.config.get_text_config().hidden_size
    checked = set()
    for name, module in modules.items():
        reason = _refusal(module) or ("" if type(module) in checked else _mixes_tokens(module, width))
        checked.add(type(module))
        if reason:
            return f": {name} {reason}"
    return ""


def _forward_in_chunks(module: Any, x: Tensor) -> Tensor:
    """Compute a feed-forward in chunks, where x (B, N, width) has more tokens than a chunk."""
    context = attached_context(module)
    if context is None or not module.training:
        return _in_chunks(module, x, context)
    with context.chunks_as_one():
        return _in_chunks(module, x, context)


def _in_chunks(module: Any, x: Tensor, context: SequenceContext | None) -> Tensor:
    compute, chunk_tokens = type(module).forward.__get__(module), getattr(module, _CHUNK)
    if x.dim() < 3 or x.shape[-2] <= chunk_tokens:
        out: Tensor = compute(x)
        return out
    is_part = context.holds_part(x) if context is not None and context.is_split else None

    def compute_chunk(chunk: Tensor) -> Tensor:
        chunk = chunk.contiguous()  # where there are several rows it is not, and the Conv1D of GPT-2 needs that
        if is_part is None:
            return compute(chunk)  # type: ignore[no-any-return]
        with inputs_as_parts(module, is_part):  # the shape of a chunk does not show it
            return compute(chunk)  # type: ignore[no-any-return]

    return in_chunks(compute_chunk, x, chunk_tokens)


def _feed_forwards(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name and the module of all that the layers of a model have besides attention and norms."""
    for name, layer in model.named_modules():
        children = dict(layer.named_children())
        if not any(_is_attention(child) for child in children.values()) or _is_attention(layer):
            continue
        for child_name, child in children.items():
            is_matrix = any(parameter.dim() > 1 for parameter in child.parameters())
            if is_matrix and not _is_attention(child):
                yield f"{name}.{child_name}", child


def _is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__


def _refusal(module: nn.Module) -> str:
    """Return why a module cannot be computed in chunks of tokens, or an empty string."""
    if isinstance(module, FeedForward):
        return ""
    kind = type(module).__name__
    if not any(isinstance(each, nn.Linear) for each in module.children()) and not any(
        type(each).__name__ == "Conv1D" for each in module.children()
    ):
        return f"({kind}) is no feed-forward of linear maps, as one with experts is not"
    parameters = [*signature(module.forward).parameters.values()]
    if sum(each.default is Parameter.empty for each in parameters) != 1:
        return f"({kind}) takes other arguments besides hidden states"
    for name, inner in module.named_modules():
        if inner is not module and not _is_by_token(inner):
            return f"({kind}) has {name} ({type(inner).__name__}), which may compute a token from others"
    return ""


@torch.no_grad()
def _mixes_tokens(module: nn.Module, width: int) -> str:
    """Return that a module gives a token another result beside other tokens, or an empty string."""
    weight = next(module.parameters())
    if weight.is_meta:
        return ""
    x = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    is_training = module.training
    module.eval()
    whole, part = module(x)[:, 1:3], module(x[:, 1:3])
    module.train(is_training)
    tolerance = max(_TOLERANCE, 4 * torch.finfo(weight.dtype).eps)
    is_close = (whole - part).abs().max() <= tolerance * whole.abs().max()
    return "" if is_close else f"({type(module).__name__}) computes a token from others"


def _is_by_token(module: nn.Module) -> bool:
    """Return whether a module maps each token by itself: a linear map, a norm, an activation or a dropout."""
    kind = type(module)
    if isinstance(module, nn.MultiheadAttention):
        return False
    return (
        isinstance(module, (nn.Linear, nn.Dropout, nn.LayerNorm))
        or kind.__name__ == "Conv1D"  # a linear map of transformers
        or "RMSNorm" in kind.__name__
        or kind.__module__ in _ACTIVATIONS
    )
