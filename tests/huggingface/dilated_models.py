"""Models of transformers whose second layer is dilated, and the equation of that layer written out."""

import architectures
import torch
from architectures import batch, whole_step

from lightning_longnet import Pattern
from lightning_longnet.huggingface.dilation import dilate

PATTERN = Pattern.dilated((4, 16, 64), (1, 2, 4), is_causal=True)


def dilated(net):
    dilate(net, PATTERN, [1])


def documents_of(kind, length):
    """Return the id of each token's document; padding at the beginning of a row is one of its own."""
    tensors = batch(kind, length)
    if kind == "padded":
        return (tensors["attention_mask"].cumsum(1) > 0).long()
    return (torch.arange(length) - tensors["position_ids"]).expand(len(tensors["input_ids"]), -1)


def weighted_reference(kind, length):
    """Return attention that counts each pair as often as the pattern shows it, in layer 1, and is plain in others."""
    ids, padding = documents_of(kind, length), batch(kind, length).get("attention_mask")
    counts = {}

    def attention(module, query, key, value, mask, scaling=None, softcap=None, s_aux=None, **_):
        if module.layer_idx != 1:
            return architectures.plain_attention(module, query, key, value, mask, scaling, softcap, s_aux)
        heads, kv_heads, n = query.shape[1], key.shape[1], query.shape[2]
        if (heads, n) not in counts:  # where a row is not the whole one, it is a document by itself
            rows = ids if n == length else torch.zeros(1, n)
            counts[heads, n] = torch.stack([packed_mask(row, heads, kv_heads) for row in rows])
        seen = counts[heads, n].double()
        if padding is not None:
            seen = seen * padding[:, None, None, :]
        key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
        scores = query @ key.mT * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = seen * (scores - 20).exp()  # of scores that are small, so that no exponential overflows
        total = weights.sum(-1, keepdim=True)
        if s_aux is not None:
            total = total + (s_aux[:, None, None] - 20).exp()
        return (weights @ value / total.masked_fill(total == 0, 1)).transpose(1, 2), None

    return attention


def packed_mask(ids, heads, kv_heads):
    """Return how often each pair of a row counts, (H, N, N): each document alone."""
    lengths = ids.unique_consecutive(return_counts=True)[1].tolist()
    counts, at = torch.zeros(heads, len(ids), len(ids)), 0
    for n in lengths:
        counts[:, at : at + n, at : at + n] = PATTERN.mask(n, heads, kv_heads)
        at += n
    return counts


def whole_dilated_step(name, kind, length=architectures.LENGTH, **changes):
    """Return what `whole_step` returns, of a model whose second layer is the equation."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import AttentionMaskInterface as Masks

    architectures.register_plain()
    AttentionInterface.register("weighted", weighted_reference(kind, length))
    AttentionMaskInterface.register("weighted", Masks()["plain"])
    return whole_step(name, kind, "weighted", length=length, **changes)
