"""The documents and the padding of the tokens that a layer attends over.

They are those of the context's batch; else documents begin where position_ids restart, and padding is that of the mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from lightning_longnet.sequence.refusals import LocalPositionsError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.pattern.pattern import Pattern
    from lightning_longnet.huggingface.masks import RingMask
    from lightning_longnet.sequence.context import SequenceContext

# what a rank says of its tokens
_RESTARTS, _IS_PADDED, _BEGINS_PADDED = 1, 2, 4


class Tokens(NamedTuple):
    """The documents, (L,) or (B, L), and the padding, (B, L), of the tokens of a call; None where there are none.

    `begins_padded`: whether the first token of some sequence is padding.
    """

    documents: Tensor | None
    key_padding_mask: Tensor | None
    begins_padded: bool


def tokens_of(
    context: SequenceContext, mask: RingMask, pattern: Pattern, position_ids: Tensor | None, q: Tensor
) -> Tokens:
    """Return the documents and padding of the tokens of q (B, L, H, D), found once for the layers of a mask.

    Where sequences are split, all ranks call it together, and a mistake of one rank raises an error on all of them.
    """
    if "tokens" not in mask.resolved:
        find = _split_tokens if context.is_split else _whole_tokens
        mask.resolved["tokens"] = find(context, mask, position_ids, q)
    tokens: Tokens = mask.resolved["tokens"]
    if tokens.begins_padded and tokens.documents is None and counts_from_start(pattern):
        if context.is_split:
            raise ValueError(
                "position_ids must count from the first token after the padding where sequences begin with padding, "
                "since segments do: give position_ids = (attention_mask.cumsum(1) - 1).clamp(0) of whole sequences, or "
                "pad on the right"
            )
        assert tokens.key_padding_mask is not None
        return tokens._replace(documents=unpadded_documents(tokens.key_padding_mask))
    return tokens


def counts_from_start(pattern: Pattern) -> bool:
    """Return whether what a query sees depends on how far it is from the first token, and not on distances alone."""
    return any(b.segment_length is not None or b.dilation_rate > 1 or b.sparsity is not None for b in pattern.branches)


def unpadded_documents(key_padding_mask: Tensor) -> Tensor:
    """Return documents that separate the padding at the beginning of each row from its tokens."""
    return ((~key_padding_mask).cumsum(1) > 0).long()


def _whole_tokens(context: SequenceContext, mask: RingMask, position_ids: Tensor | None, q: Tensor) -> Tokens:
    documents, padding = context.documents, mask.key_padding_mask
    if padding is None:
        padding = context.key_padding_mask
    for name, x in (("documents", documents), ("attention_mask", padding)):
        if x is not None and x.shape[-1] != q.shape[1]:
            raise ValueError(
                f"{name} of the batch must have the model's {q.shape[1]} tokens, got {x.shape[-1]}: for other "
                f"sequences than the batch's, `with sequence_context(model).whole():`"
            )
    if documents is None and position_ids is not None and position_ids.shape[-1:] == q.shape[1:2]:
        if position_ids.dim() == 2:
            # padding on the left often has position -1, from which 0 follows, the first token
            borders = position_ids.clamp(min=0).diff(dim=-1) != 1
            documents = F.pad(borders.cumsum(-1), (1, 0)) if bool(borders.any()) else None
            if documents is not None and documents.shape[0] == 1:
                documents = documents[0]
    elif documents is None:
        documents = mask.documents
    if padding is not None and not bool(padding.any()):
        padding = None
    return Tokens(documents, padding, padding is not None and bool(padding[:, 0].any()))


def _split_tokens(context: SequenceContext, mask: RingMask, position_ids: Tensor | None, q: Tensor) -> Tokens:
    documents, padding = context.documents, context.key_padding_mask
    if documents is None and position_ids is None:
        raise ValueError(
            "documents must be in the batch of this model where sequences are split, as its layers are not given "
            "position_ids, from which they could know them: an id for each token, all 0 where each row is one document"
        )
    shard = context.shard_of(documents, padding if documents is not None else None)
    index = context.positions_of(q)
    fault, starts = _padding_fault(mask.key_padding_mask, padding, q), None  # type: ValueError | None, Tensor | None
    if padding is None and fault is None:
        padding = mask.key_padding_mask
    if position_ids is not None and fault is None:
        places = shard.places.to(q.device) if documents is not None else None
        fault = _positions_fault(position_ids, index, places)
        if documents is None and fault is None:
            starts = context.once(position_ids, "first tokens of documents", lambda: index - position_ids.clamp(min=0))
            if bool((starts.diff(dim=-1) < 0).any()):
                fault = ValueError(
                    "position_ids must continue by 1, or restart at 0 where a document begins, got a gap"
                )
    flags = 0
    if fault is None:
        if starts is not None and bool((starts != 0).any()):
            flags |= _RESTARTS
        if padding is not None and bool(padding.any()):
            flags |= _IS_PADDED
            if len(index) and index[0] == 0 and bool(padding[:, 0].any()):
                flags |= _BEGINS_PADDED
    everywhere = shard.exchange_value(flags, "compares positions", "" if fault is None else str(fault))
    if fault is not None:
        raise fault
    any_of = 0
    for flag in everywhere:
        any_of |= flag
    if any_of & _RESTARTS:
        assert starts is not None
        documents = starts[0] if starts.shape[0] == 1 and q.shape[0] != 1 else starts
    return Tokens(documents, padding if any_of & _IS_PADDED else None, bool(any_of & _BEGINS_PADDED))


def _padding_fault(given: Tensor | None, padding: Tensor | None, q: Tensor) -> ValueError | None:
    """Return the error of a padding that the model was given and that is not that of this rank's tokens, or None."""
    if given is None:
        return None
    if given.shape != q.shape[:2]:
        shown = f"{tuple(q.shape[:2])}, got {tuple(given.shape)}"
        return ValueError(f"attention_mask must be (batch, tokens) of the tokens on this rank, {shown}")
    if padding is not None and not torch.equal(given, padding.to(given.device)):
        return ValueError("attention_mask must be that of the batch that was split, got another one")
    return None


def _positions_fault(position_ids: Tensor, index: Tensor, places: Tensor | None) -> ValueError | None:
    """Return the error of position_ids that are not those of this rank's tokens, or None.

    Without position_ids a model counts the tokens of each rank from 0.

    Args:
        position_ids: (B, L) or (1, L).
        index: (L,) the index of each token of this rank in the whole sequence.
        places: the index of each token in its document, where documents are known.
    """
    if position_ids.dim() != 2 or position_ids.shape[-1] != len(index):
        shown = f"(batch, {len(index)}), those of this rank, got {tuple(position_ids.shape)}"
        return ValueError(f"position_ids must be {shown}")
    if not len(index) or index[0] == 0:
        return None
    counted = torch.arange(len(index), device=index.device)
    if not bool((position_ids == counted).all()) or (places is not None and bool((places == counted).all())):
        return None
    return LocalPositionsError(
        "position_ids must be those of the whole sequence, got positions that begin at 0 on each rank, as models count "
        "where they are given none: give context.positions_of(input_ids)[None], or the index of each token in its "
        'document. If a document does begin at the first token of this rank, put "documents" into the batch'
    )
