"""What a model of transformers does that cannot be right where each rank has a part of the sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lightning_longnet.huggingface.models import RING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

# kinds of layers in `config.layer_types` that attend to all tokens before them, or to a window or a chunk of them
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
# kinds of the feed-forward, which some configurations list there as well
_FEED_FORWARD = ("sparse", "dense", "moe")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d)


def check_splits(model: PreTrainedModel) -> None:
    """Raise a ValueError that names what cannot be computed on parts of sequences, where a model has such layers."""
    reason = next(_reasons(model), None)
    if reason is not None:
        raise ValueError(
            f"{type(model).__name__} cannot be split over ranks: {reason}. Train it with sequence_parallel_size=1, or "
            f"take a model whose layers all attend through transformers' AttentionInterface"
        )


def _reasons(model: PreTrainedModel) -> Iterator[str]:
    config = model.config
    kinds = getattr(config, "layer_types", None) or ()
    for number, kind in enumerate(kinds):
        if kind not in (*_ATTENTION, *_FEED_FORWARD):
            yield f"layer {number} is of the kind {kind!r}, which carries a state along the tokens or mixes neighbours"
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, _CONVOLUTIONS) and any(size > 1 for size in module.kernel_size):
            yield f"{name} is a convolution ({kind}), which mixes neighbouring tokens"
        if isinstance(module, nn.RNNBase):
            yield f"{name} is recurrent ({kind})"
        if isinstance(module, nn.modules.batchnorm._NormBase):
            yield f"{name} ({kind}) takes statistics over the tokens of a rank"
        if getattr(module, "is_causal", None) is False:
            yield f"{name} ({kind}) is not causal, so that tokens see those that they are to predict"
    if not type(model)._supports_attention_backend:
        yield "its attention does not go through transformers' AttentionInterface, but calls a kernel by itself"
    if config._attn_implementation != RING:
        yield f"attn_implementation is {config._attn_implementation!r}, which sees one rank's tokens, and not 'ring'"
    if getattr(config, "output_router_logits", False):
        yield "output_router_logits adds a loss of whole sequences to that of the tokens; set it to False"
