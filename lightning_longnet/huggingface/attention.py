"""`ring_attention`: the attention of transformers' models as `attend`, on whole sequences or over ranks.

It is registered as `attn_implementation="ring"`.  Layers get the context of a split batch through `attach_context`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_longnet.attention.pattern.pattern import Pattern
from lightning_longnet.huggingface.cached import attend_cached
from lightning_longnet.huggingface.dilation import guard_layer, layer_pattern
from lightning_longnet.huggingface.masks import RingMask
from lightning_longnet.huggingface.tokens import tokens_of
from lightning_longnet.sequence.attach import sequence_context

if TYPE_CHECKING:
    from torch import Tensor, nn

# keyword arguments of transformers' models that do not change what attention returns
_WITHOUT_EFFECT = {
    *("position_embeddings", "position_ids", "past_key_values", "use_cache", "cache_position", "is_first_iteration"),
    *("output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep", "num_items_in_batch"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "shift_labels"),
}


def ring_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: RingMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return (out, None), out (B, N, H, Dv), as transformers' functions of attention do.

    A ValueError names an argument that changes the result and that this function does not know.

    Args:
        module: the layer; `sequence_context` of it says whether its sequences are split.
        query, key, value: (B, H, N, D), (B, Hkv, N, D) and (B, Hkv, N, Dv).
        attention_mask: what `ring_mask` returned, or None where the model makes no mask.
        scaling: the factor of the scores.
        dropout: the probability that a pair is dropped.
        options: further arguments of transformers: sliding_window, s_aux, softcap, is_causal, position_ids, ...
    """
    mask = _mask_of(module, attention_mask, options)
    sinks, softcap = options.pop("s_aux", None), options.pop("softcap", None)
    _refuse(options)
    context = sequence_context(module)
    queries, keys = query.shape[2], key.shape[2]
    own_pattern = layer_pattern(module)
    if own_pattern is not None:
        guard_layer(module)
    if queries != keys or not mask.is_whole:
        if context.is_split:
            raise ValueError(
                f"sequences that are split over ranks have no key cache, got {queries} queries and {keys} keys: set "
                f"use_cache=False, and generate inside `with sequence_context(model).whole():`"
            )
        terms = {"scale": scaling, "sinks": sinks, "softcap": softcap}
        return attend_cached(query, key, value, mask, own_pattern, dropout=dropout, **terms), None
    pattern = mask.pattern if own_pattern is None else own_pattern
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    tokens = tokens_of(context, mask, pattern, options.get("position_ids"), q)
    out = context.attend(
        q,
        k,
        v,
        pattern,
        documents=tokens.documents,
        key_padding_mask=tokens.key_padding_mask,
        dropout=dropout,
        layer=getattr(module, "layer_idx", 0) or 0,
        scale=scaling,
        sinks=sinks,
        softcap=softcap,
    )
    return out, None


def _mask_of(module: nn.Module, mask: Any, options: dict[str, Any]) -> RingMask:
    """Return the mask of a layer, and take the arguments that say the same out of `options`."""
    window, is_causal = options.pop("sliding_window", None), options.pop("is_causal", None)
    if mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        return RingMask(Pattern.dense(causal) if window is None else Pattern.window(window, causal))
    if not isinstance(mask, RingMask):
        shown = f"a tensor of shape {tuple(mask.shape)}" if hasattr(mask, "shape") else type(mask).__name__
        raise ValueError(
            f"attention_mask must be (batch, tokens), 0 where padding is, for attn_implementation='ring', got {shown}: "
            f"a mask of all pairs is not split over ranks. Packed documents are given by position_ids that restart"
        )
    own = mask.pattern.branches[0].window
    if window is not None and window != own:
        raise ValueError(
            f"sliding_window of {type(module).__name__}, {window}, must be that of its mask, {own}: transformers' own "
            f"implementations differ here, so attn_implementation='ring' serves neither"
        )
    return mask


def _refuse(options: dict[str, Any]) -> None:
    """Raise a ValueError for arguments that change the result and that `attend` does not take."""
    if options.get("output_attentions"):
        raise ValueError("output_attentions must be False: the kernels compute no matrix of attention weights")
    for name, value in options.items():
        if value is not None and value is not False and name not in _WITHOUT_EFFECT:
            raise ValueError(
                f"{name} is no argument that attn_implementation='ring' knows, and it may change the result; "
                f"attn_implementation='eager' serves it where sequences are not split"
            )
